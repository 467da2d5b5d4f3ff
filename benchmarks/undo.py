"""What undoing a hidden basis gives an attacker: merges of a control that rivals have hidden.

    PYTHONPATH=tests/attacks TRAP2_DATA=/path/to/data python benchmarks/undo.py

Takes the controls of `first_bench.py` (`--releases`), merges the adapter of `trec6` into its base,
hides it as rivals do (`tests/attacks/hiding.py`), and merges it with the other three by task
arithmetic at fixed coefficients: as it is, undone by `nearest`, undone by `anchor_guided`. Writes
`results/undo.json`. Minutes on two cores.
"""

import argparse
import math
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from hiding import RIVALS, hide_folder

from first_bench import RESULTS, TASKS, task_section
from trap2.attacks.write import write_merge
from trap2.auditing.arena import RELEASE, Arena, Mixture
from trap2.demo.run import encoder_folder
from trap2.errors import UserError
from trap2.files import read_json, write_json
from trap2.provenance import machine, versions
from trap2.recipes import AuditSpec
from trap2.update import Update

HIDDEN = "trec6"
UNDOS = (None, "nearest", "anchor_guided")
COEFFICIENTS = (0.3, 0.5)


def main() -> None:
    """Measure every way to hide and every way to undo it."""
    top = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    top.add_argument("--releases", type=Path, default=Path("build/bench/releases"))
    top.add_argument("--rows", type=int, default=100, help="test rows of each task")
    chosen = top.parse_args()
    data = Path(os.environ.get("TRAP2_DATA", "")) / "text"
    base = encoder_folder()
    heads = read_json(base / "config.json")["num_attention_heads"]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        adapter = Update.open(chosen.releases / f"lora-control-{HIDDEN}-0", base)
        plain = write_merge(Path(scratch) / "plain", "task_arithmetic", [adapter], 1.0, {})
        for rival in (None, *RIVALS):
            place = plain
            if rival is not None:
                place = hide_folder(plain, Path(scratch) / rival, "bert", heads, heads, rival)
            for undo in UNDOS:
                key = f"{rival or 'not hidden'} / {undo or 'as it is'}"
                found[key] = measured(data, chosen.releases, place, undo, chosen.rows, adapter)
                print(key, found[key])
    record = {
        "command": "PYTHONPATH=tests/attacks TRAP2_DATA=... python benchmarks/undo.py",
        "machine": machine(),
        "versions": versions(),
        "hidden": f"lora-control-{HIDDEN}-0, merged into its base",
        "ways": {rival: list(ways) for rival, ways in RIVALS.items()},
        "rows": chosen.rows,
        "found": found,
    }
    write_json(RESULTS / "undo.json", record)


def measured(
    data: Path, releases: Path, place: Path, undo: str | None, rows: int, adapter: Update
) -> Any:
    """Accuracy alone, and merged with the other three, by coefficient; partners as their mean.

    Beside it the cosine of the update that is merged and that of the adapter before it was hidden.
    """
    others = [name for name in TASKS if name != HIDDEN]
    content = {
        "base": str(encoder_folder()),
        "release": {"path": str(place), "task": task_section(data, HIDDEN)},
        "partners": [
            {"path": str(releases / f"lora-control-{name}-0"), "task": task_section(data, name)}
            for name in others
        ],
        "attacker": {"suite": "quick", "undo": undo, "validation_rows": 10, "test_rows": rows},
    }
    arena = Arena(AuditSpec.model_validate(content))

    def accuracy(mixture: Mixture, member: str) -> float:
        return round(arena.evaluate(mixture, member, "test").accuracy, 4)

    result: dict[str, Any] = {
        name: accuracy(arena.alone(RELEASE, s), RELEASE) for name, s in (("base", 0), ("alone", 1))
    }
    own, true = arena.members[RELEASE].vector, dict(adapter)
    inner = sum(float((own[name] * delta).sum()) for name, delta in true.items())
    lengths = [math.hypot(*(float(t.norm()) for t in v.values())) for v in (own, true)]
    result["cosine"] = round(inner / math.prod(lengths), 4)
    for c in COEFFICIENTS:
        merged = Mixture("task_arithmetic", (RELEASE, *others), (c,) * len(TASKS))
        partners = statistics.mean(accuracy(merged, name) for name in others)
        result[f"c={c}"] = {HIDDEN: accuracy(merged, RELEASE), "partners": round(partners, 4)}
    return result


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
