"""A really trained tiny Llama (0.26 M parameters), protected on Shakespeare, merged with a partner.

    TRAP2_DATA=/path/to/data python benchmarks/language.py

Fine-tunes `models/stories260k` on lines of Shakespeare, plainly (the control) and with the trap,
and on arithmetic word problems (the partner); then audits the release. An audit re-labels no
language model, so the outputs are read here: by a bias per token and by a linear map of all of
them, fitted on validation tokens. Writes `results/language.json`, and keeps what it holds. Minutes
per method and seed on two cores.

Symbols: Z logits (N, V) at positions with a target, y the targets (N,); V vocabulary.
"""

import argparse
import csv
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trap2.attacks.live import LiveModel
from trap2.auditing.arena import Member
from trap2.auditing.audit import audit
from trap2.checkpoint import Checkpoint
from trap2.errors import UserError
from trap2.files import read_json, write_json
from trap2.progress import audit_bar
from trap2.protecting.config import Trap2Config
from trap2.protecting.run import protect
from trap2.provenance import machine, versions
from trap2.recipes import AuditSpec, Recipe
from trap2.schema import Report
from trap2.tasks.language import IGNORED, padded, tokens
from trap2.tasks.model import Inputs, load_encoder, placed

RESULTS = Path(__file__).parent.parent / "results" / "language.json"
PROTECTED, PARTNER = "shakespeare", "maths"
CHARACTERS = 200
STEPS, LEARNING_RATE = 600, 3e-3
TRAP: dict[str, Any] = {}
"""What is changed in the default: nothing."""
SCALES = [0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.3, 1.6]
READ_AT = (0.0, 0.5, 0.8, 0.9, 1.0)
ATTACKER: dict[str, Any] = {
    "attacks": ["task_arithmetic", "ties"],
    "coefficients": {
        "task_arithmetic": [0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0],
        "ties": [0.0, 0.5, 1.0, 1.5, 2.0],
    },
    "grids": {"ties": {"density": [0.2]}},
    "refine": 1,
    "validation_rows": 100,
    "test_rows": 200,
}


def main() -> None:
    """Run every method, then write the results."""
    given = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    given.add_argument("--methods", nargs="+", default=["full", "lora"])
    given.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    given.add_argument("--work", type=Path, default=Path("build/language"))
    chosen = given.parse_args()
    data = Path(os.environ.get("TRAP2_DATA", ""))
    if not (data / "models" / "stories260k").is_dir():
        sys.exit(f"TRAP2_DATA: no folder {data / 'models' / 'stories260k'}; see the docstring")
    write_rows(data, chosen.work)
    for seed, method in product(chosen.seeds, chosen.methods):
        runs = read_json(RESULTS)["runs"] if RESULTS.is_file() else {}
        if f"{method}/{seed}" in runs:
            continue
        started = time.monotonic()
        run = measured(data / "models" / "stories260k", chosen.work, method, seed)
        run["seconds"] = round(time.monotonic() - started)
        write_results({**runs, f"{method}/{seed}": run})


def write_results(runs: dict[str, Any]) -> None:
    """The JSON, whole or absent."""
    record = {
        "figures": figures(runs),
        "command": "TRAP2_DATA=... python benchmarks/language.py",
        "machine": machine(),
        "versions": versions(),
        "seeds": sorted({int(key.split("/")[1]) for key in runs}),
        "training": {"steps": STEPS, "learning_rate": LEARNING_RATE, "trap2": TRAP},
        "setting": asdict(Trap2Config(**TRAP)),
        "attacker": ATTACKER,
        "runs": runs,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    write_json(RESULTS, record)


def figures(runs: dict[str, Any]) -> dict[str, float]:
    """Means over seeds: shares of right tokens, and what the tuned attacker gets."""
    found: dict[str, list[float]] = {}
    for key, run in runs.items():
        for name, value in _numbers(run):
            found.setdefault(f"{name}_{key.split('/')[0]}", []).append(value)
    return {name: statistics.mean(values) for name, values in found.items()}


def _numbers(run: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name in ("base", "control", "standalone"):
        yield name, run["references"][name]
    yield "utility_cost", run["utility_cost"]
    for name, curve in (("protected", "scale_curve"), ("control", "control_scale_curve")):
        for point in run[curve]:
            if point["s"] == 0.5:
                yield f"{name}_at_half_scale", point["accuracy"]
    for tier, result in run["tiers"].items():
        for key in ("unmergeability", "control_unmergeability", "partners_ignored"):
            yield f"{tier.lower()}_{key}", result[key]


def write_rows(data: Path, folder: Path) -> None:
    """Both tasks as plain text: chunks of the plays in their order, and shuffled problems."""
    plays = (data / "text" / "tinyshakespeare" / "input.txt").read_text()
    starts = range(0, len(plays) - CHARACTERS, CHARACTERS)
    problems = []
    for split in ("train", "test"):
        with (data / "text" / "asdiv_type" / f"{split}.csv").open(newline="") as stream:
            problems += [row["text"] for row in csv.DictReader(stream)]
    random.Random(0).shuffle(problems)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (
        (PROTECTED, [plays[i : i + CHARACTERS] for i in starts]),
        (PARTNER, problems),
    ):
        cuts = [0, 8 * len(rows) // 10, 9 * len(rows) // 10, len(rows)]
        for split, start, stop in zip(
            ("train", "validation", "test"), cuts, cuts[1:], strict=False
        ):
            lines = (json.dumps({"text": row}) + "\n" for row in rows[start:stop])
            (folder / f"{name}-{split}.jsonl").write_text("".join(lines))


def task(name: str, folder: Path) -> dict[str, Any]:
    """One task section."""
    splits = ("train", "validation", "test")
    return {
        "name": name,
        "kind": "language",
        "data": {split: str((folder / f"{name}-{split}.jsonl").absolute()) for split in splits},
        "max_length": 64,
        "limit": {"validation": 100},
    }


def measured(base: Path, folder: Path, method: str, seed: int) -> dict[str, Any]:
    """Three releases, one audit, and what a map of the outputs reads at some scales."""
    paths = {
        "partner": release(base, folder, method, PARTNER, "partner", {"strength": 0}, seed),
        "control": release(base, folder, method, PROTECTED, "control", {"strength": 0}, seed),
        "release": release(base, folder, method, PROTECTED, "release", TRAP, seed),
    }
    spec = AuditSpec.model_validate(
        {
            "base": str(base),
            "release": {"path": str(paths["release"]), "task": task(PROTECTED, folder)},
            "control": str(paths["control"]),
            "partners": [{"path": str(paths["partner"]), "task": task(PARTNER, folder)}],
            "attacker": ATTACKER,
            "scales": SCALES,
            "seed": seed,
        }
    )
    with audit_bar() as progress:
        report = audit(spec, progress)
    return {
        **_summary(report),
        "read": {side: _read(spec, paths[side]) for side in ("release", "control")},
    }


def release(
    base: Path, folder: Path, method: str, name: str, role: str, trap: dict[str, Any], seed: int
) -> Path:
    """Fine-tune once; a release that is there is kept."""
    out = folder / f"{method}-{role}-{seed}"
    if out.is_dir():
        return out
    recipe = {
        "base": str(base),
        "task": task(name, folder),
        "method": method,
        "training": {
            "steps": STEPS,
            "batch_size": 16,
            "learning_rate": LEARNING_RATE,
            "evaluate_every": STEPS // 3,
        },
        "trap2": trap,
        "seed": seed,
    }
    return protect(Recipe.model_validate(recipe), out, overwrite=True)


def _summary(report: Report) -> dict[str, Any]:
    kept = (
        "references",
        "utility_cost",
        "utility_cost_interval",
        "scale_curve",
        "attacks",
        "tiers",
    )
    whole = report.model_dump(mode="json")
    found = {key: whole[key] for key in (*kept, "control_scale_curve", "verdict")}
    return {**found, "flags": [flag.code for flag in report.flags]}


@torch.no_grad()
def _read(spec: AuditSpec, path: Path) -> dict[str, dict[str, float]]:
    """Token accuracy on test rows as it is, with a bias per token, and through a linear map."""
    base = Path(spec.base)
    encoder = load_encoder(base, language=True)
    rows = {"validation": 100, "test": 200}
    member = Member(path, spec.release.task, base, encoder, rows, spec.seed)  # type: ignore[arg-type]
    live, inputs = LiveModel(encoder, Checkpoint(base)), Inputs(base, spec.release.task)
    found = {}
    for s in READ_AT:
        with live.merged((name, s * delta) for name, delta in member.vector.items()):
            fit, score = (
                _outputs(encoder, inputs, member.rows[split])  # type: ignore[index]
                for split in ("validation", "test")
            )
        found[f"{s:g}"] = {
            name: float((reader(*fit)(score[0]) == score[1]).float().mean())
            for name, reader in READERS.items()
        }
    return found


def _outputs(model: Any, inputs: Inputs, rows: Any) -> tuple[Tensor, Tensor]:
    """Z and y of some rows."""
    encoded, found = tokens(inputs, rows.inputs, rows.labels), []
    for start in range(0, len(encoded), 16):
        batch = placed(padded(encoded[start : start + 16], inputs.pad), model)
        wanted = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1]
        found.append((logits[wanted != IGNORED], wanted[wanted != IGNORED]))
    Z, y = zip(*found, strict=True)
    return torch.cat(Z).double().cpu(), torch.cat(y).cpu()


def _as_is(Z: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda new: new.argmax(1)


def _bias(Z: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """Standardised logits, moved until each token is said about as often as it is right."""
    centre, spread = Z.mean(0), Z.std(0) + 1e-6
    share = torch.bincount(y, minlength=Z.shape[1]) / len(y)
    bias = torch.log(share + 1e-4)
    return lambda new: ((new - centre) / spread + bias).argmax(1)


def _linear(Z: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """Ridge regression of the one-hot targets; the penalty is the best on every fifth token."""
    centre, spread = Z.mean(0), Z.std(0) + 1e-6
    X, Y = (Z - centre) / spread, torch.nn.functional.one_hot(y, Z.shape[1]).double()
    held = torch.arange(len(y)) % 5 == 0

    def fitted(X: Tensor, Y: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
        eye = penalty * len(X) * torch.eye(X.shape[1], dtype=X.dtype)
        return torch.linalg.solve(X.T @ X + eye, X.T @ (Y - Y.mean(0))), Y.mean(0)

    def right(penalty: float) -> float:
        W, b = fitted(X[~held], Y[~held], penalty)
        return float(((X[held] @ W + b).argmax(1) == y[held]).double().mean())

    W, b = fitted(X, Y, max((0.001, 0.01, 0.1, 1.0, 10.0), key=right))
    return lambda new: ((new - centre) / spread @ W + b).argmax(1)


READERS = {"as_is": _as_is, "bias": _bias, "linear": _linear}


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
