"""How many steps, and how many seconds, it takes to protect: the default beside the paper's step.

    TRAP2_DATA=/path/to/data python benchmarks/steps_to_protect.py

Protects `trec6` of `first_bench.py` with LoRA, by the default and by the paper's objective (every
row twice, unbounded ascent, strength .01 and .1), each for several numbers of steps: every one is a
run of its own, for learning rate and trap follow a schedule to its end. Each release is audited
with task arithmetic, one shared coefficient, raw (T1) and re-labelled with 300 rows (T2), beside
the control of `first_bench.py` and with its partners; `--work` may be its folder. A setting has
protected at the first number of steps with T1 unmergeability of .9 and more at a utility cost of
one point at most. Writes `results/steps_to_protect.json`; what it holds is kept. Hours.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import first_bench
from first_bench import Bench
from trap2.auditing.audit import audit
from trap2.auditing.ledger import Ledger
from trap2.errors import UserError
from trap2.files import read_json, write_json
from trap2.progress import audit_bar
from trap2.protecting.run import protect
from trap2.provenance import machine, versions
from trap2.recipes import AuditSpec, Recipe

TASK, METHOD = "trec6", "lora"
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper_0.01": {"preset": "paper", "strength": 0.01},
    "paper_0.1": {"preset": "paper", "strength": 0.1},
}
STEPS = {"default": (150, 300, 450, 600), "paper_0.01": (600, 1200), "paper_0.1": (600, 1200)}
ATTACKER: dict[str, Any] = {
    "attacks": ["task_arithmetic"],
    "coefficients": [0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0],
    "grids": {},
    "t3_attacks": [],
    "relabel_rows": [300],
}
UNMERGEABLE, COST = 0.9, 0.01


def main() -> None:
    """Run what is missing, then write the results from what is there."""
    top = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    top.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    top.add_argument("--steps", nargs="+", type=int, help="instead of each setting's own")
    top.add_argument("--seed", type=int, default=0)
    first_bench.add_precision(top)
    top.add_argument("--work", type=Path, default=Path("build/bench"))
    top.add_argument("--out", type=Path, default=first_bench.RESULTS / "steps_to_protect.json")
    chosen = top.parse_args()
    data = Path(os.environ.get("TRAP2_DATA", "")) / "text"
    if not (data / TASK).is_dir():
        raise UserError(f"TRAP2_DATA: no folder {data / TASK}; set it to the folder of the data")
    bench = first_bench.text_bench(chosen.precision)
    runs: dict[str, Any] = read_json(chosen.out)["runs"] if chosen.out.is_file() else {}
    for setting in chosen.settings:
        for steps in chosen.steps or STEPS[setting]:
            key = f"{setting}/{steps}/{chosen.seed}"
            if key not in runs:
                runs[key] = measured(bench, chosen.work, data, setting, steps, chosen.seed)
                write(chosen.out, runs)
    write(chosen.out, runs)


def measured(
    bench: Bench, work: Path, data: Path, setting: str, steps: int, seed: int
) -> dict[str, Any]:
    """Train and audit one release."""
    release = work / "steps" / f"{setting}-{steps}-{seed}"
    task = bench.section(data, TASK)
    base = str(bench.base(data))
    recipe = {
        "base": base,
        "task": task,
        "method": METHOD,
        "training": {**bench.training[METHOD], "steps": steps},
        "trap2": SETTINGS[setting],
        "seed": seed,
    }
    if not (release / "trap2.json").is_file():
        protect(Recipe.model_validate(recipe), release, overwrite=True)

    def control(name: str) -> str:
        return str(first_bench.make_release(work, data, METHOD, "control", name, seed, bench))

    spec = {
        "base": base,
        "release": {"path": str(release), "task": task},
        "control": control(TASK),
        "partners": [
            {"path": control(name), "task": bench.section(data, name)}
            for name in bench.tasks
            if name != TASK
        ],
        "attacker": {**bench.attacker, **ATTACKER},
        "seed": seed,
    }
    with audit_bar() as progress, Ledger(work / "steps") as ledger:
        report = audit(AuditSpec.model_validate(spec), progress, ledger)
    cost = report.utility_cost
    assert cost is not None
    return {
        "steps": steps,
        "seconds": read_json(release / "trap2.json")["training_seconds"],
        "utility_cost": cost,
        "t1_unmergeability": report.tiers["T1"].unmergeability,
        "t2_unmergeability": report.tiers["T2"].unmergeability,
        "precision": report.settings["precision"],
        "t1_control_unmergeability": report.tiers["T1"].control_unmergeability or 0.0,
    }


def figures(runs: dict[str, Any]) -> dict[str, float]:
    """Where each setting has protected first; nothing of one that has not."""
    found: dict[str, float] = {}
    for key, run in sorted(runs.items(), key=lambda item: item[1]["steps"]):
        setting = key.split("/")[0]
        found[f"{setting}_steps_tried_max"] = run["steps"]
        protected = run["t1_unmergeability"] >= UNMERGEABLE and run["utility_cost"] <= COST
        if protected and f"{setting}_steps" not in found:
            found[f"{setting}_steps"] = run["steps"]
            found[f"{setting}_seconds"] = run["seconds"]
    return found


def write(out: Path, runs: dict[str, Any]) -> None:
    """The results from all runs so far."""
    record = {
        "figures": figures(runs),
        "command": "TRAP2_DATA=... python benchmarks/steps_to_protect.py",
        "machine": machine(),
        "versions": versions(),
        "seeds": sorted({int(key.split("/")[2]) for key in runs}),
        "attacker": ATTACKER,
        "runs": runs,
    }
    write_json(out, record)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
