"""What training against surrogate partners wins: `trec6` merged at its own scale with strangers.

    TRAP2_DATA=/path/to/data python benchmarks/surrogates.py

Makes a bank of 4 from the unlabelled rows of five other sets, protects `trec6` (LoRA) with the
default trap, with the bank, and with 16 partners made of it by transforms, and merges each release
at c_T = 1 with plain fine-tunes of `agnews`, `sst2` and `subj`, which no bank has seen, at .2 to 1:
one at a time, and all three. The attacker of tier T3 who ignores the partners' rule keeps the best
of these. Writes `results/surrogates.json`. Releases, the bank and evaluations are kept in `--work`,
so that a run that was cut short goes on where it was.
"""

import argparse
import csv
import io
import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from first_bench import PRECISION, RESULTS, SETTINGS, STEPS, TASKS, make_release, task_section
from trap2.auditing.arena import RELEASE, Arena
from trap2.auditing.ledger import Ledger
from trap2.auditing.mixture import Mixture
from trap2.demo.run import encoder_folder
from trap2.errors import UserError
from trap2.files import read_json, write_json, write_text
from trap2.protecting.bank import build_bank
from trap2.provenance import machine, versions
from trap2.recipes import AuditSpec, BankRecipe
from trap2.tasks.relabel import relabelled_accuracy

PROTECTED = "trec6"
SOURCES = ("cola", "sms_spam", "cr", "mpqa", "asdiv_type")
"""Sets whose unlabelled rows the bank is made from."""

BANKS: dict[str, dict[str, Any]] = {"bank_4": {}, "bank_16": {"surrogate_count": 16}}
EVERYTHING = ("control", "default", *BANKS)
COEFFICIENTS = (0.2, 0.4, 0.6, 0.8, 1.0)
RELABEL_ROWS = 300
SEED = 1
BANK_STEPS = 150


def main() -> None:
    """Make what is missing, then write the results from what is there."""
    chosen = _arguments()
    data = Path(os.environ.get("TRAP2_DATA", "")) / "text"
    if not (data / PROTECTED).is_dir():
        sys.exit(f"TRAP2_DATA: no folder {data / PROTECTED}; set it to the folder with text/")
    out = RESULTS / "surrogates.json"
    for name in chosen.settings:
        runs: dict[str, Any] = read_json(out)["runs"] if out.is_file() else {}
        if name not in runs:
            if name in BANKS:
                SETTINGS[name] = {"surrogates": str(_bank(chosen, data)), **BANKS[name]}
            runs[name] = _measured(chosen, data, name)
            _write(out, {key: runs[key] for key in EVERYTHING if key in runs})


def _arguments() -> argparse.Namespace:
    top = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    top.add_argument("--settings", nargs="+", default=EVERYTHING, choices=EVERYTHING)
    top.add_argument("--work", type=Path, default=Path("build/surrogates"))
    return top.parse_args()


def _bank(chosen: argparse.Namespace, data: Path) -> Path:
    """The bank's folder, made if it is not there yet."""
    out: Path = (chosen.work / "bank").absolute()
    if not (out / "bank.json").is_file():
        training = {"steps": BANK_STEPS, "evaluate_every": BANK_STEPS}
        recipe = {
            "base": str(encoder_folder()),
            **_unlabelled(chosen, data),
            "count": 4,
            "training": {**training, "learning_rate": 1e-3, "precision": PRECISION},
        }
        build_bank(BankRecipe.model_validate(recipe), out)
    return out


def _unlabelled(chosen: argparse.Namespace, data: Path) -> dict[str, Any]:
    table = io.StringIO()
    rows = csv.writer(table)
    rows.writerow(["text"])
    for name in SOURCES:
        with (data / name / "train.csv").open(newline="", encoding="utf-8") as stream:
            rows.writerows([row["text"]] for row in csv.DictReader(stream) if row["text"].strip())
    texts = chosen.work.absolute() / "texts.csv"
    chosen.work.mkdir(parents=True, exist_ok=True)
    write_text(texts, table.getvalue())
    return {"texts": {"train": str(texts)}}


def _measured(chosen: argparse.Namespace, data: Path, setting: str) -> dict[str, Any]:
    """What is left of one release: alone, off its scale, and beside strangers."""
    release = make_release(chosen.work, data, "lora", setting, PROTECTED, SEED)
    partners = [name for name in TASKS if name != PROTECTED]
    made = {
        name: make_release(chosen.work, data, "lora", "control", name, SEED) for name in partners
    }
    spec = {
        "base": str(encoder_folder()),
        "release": {"path": str(release.absolute()), "task": task_section(data, PROTECTED)},
        "partners": [
            {"path": str(made[name].absolute()), "task": task_section(data, name)} for name in made
        ],
        "attacker": {
            "suite": None,
            "attacks": ["task_arithmetic"],
            "t3_attacks": ["task_arithmetic"],
            "precision": PRECISION,
            "validation_rows": RELABEL_ROWS,
            "test_rows": 500,
        },
    }
    with Ledger(chosen.work / "ledger") as ledger:
        arena = Arena(AuditSpec.model_validate(spec), ledger=ledger)
        record = read_json(release / "trap2.json")
        return {
            "validation": record["validation"]["chosen"],
            "scale_curve": record["validation"]["scale_curve"],
            "base": _read(arena, arena.alone(RELEASE, 0.0)),
            "alone": _read(arena, arena.alone(RELEASE)),
            "shared": {f"{c:g}": _read(arena, _merge(partners, c, c)) for c in (0.3, 0.5, 0.7)},
            "beside": list(_beside(arena, partners)),
        }


def _merge(partners: list[str], own: float, others: float) -> Mixture:
    return Mixture("task_arithmetic", (RELEASE, *partners), (own, *[others] * len(partners)))


def _read(arena: Arena, mixture: Mixture) -> dict[str, float]:
    """Accuracy on `trec6`'s test rows, as it answers and re-labelled."""
    fit, score = (arena.evaluate(mixture, RELEASE, split) for split in ("validation", "test"))
    return {
        "raw": score.accuracy,
        "relabelled": round(relabelled_accuracy(fit, score, RELABEL_ROWS), 4),
    }


def _beside(arena: Arena, partners: list[str]) -> Iterator[dict[str, Any]]:
    """The release at 1, partners at every coefficient: one at a time, and all of them."""
    for group in [*([name] for name in partners), partners]:
        for c in COEFFICIENTS:
            mixture = _merge(group, 1.0, c)
            kept = [arena.evaluate(mixture, name, "validation").accuracy for name in group]
            alone = [arena.evaluate(arena.alone(n), n, "validation").accuracy for n in group]
            shares = [mine / own for mine, own in zip(kept, alone, strict=True)]
            found = {"partners": group, "c": c, **_read(arena, mixture)}
            yield {**found, "partners_keep": round(statistics.mean(shares), 4)}


def figures(runs: dict[str, Any]) -> dict[str, float]:
    """The named numbers of each setting: utility, and the most that is kept beside strangers."""
    found = {}
    for name, run in runs.items():
        found[f"{name}_alone"] = run["alone"]["raw"]
        for c in COEFFICIENTS:
            merges = [m for m in run["beside"] if m["c"] == c]
            for how in ("raw", "relabelled"):
                found[f"{name}_{how}_beside_{c:g}"] = max(merge[how] for merge in merges)
    return found


def _write(out: Path, runs: dict[str, Any]) -> None:
    record = {
        "figures": figures(runs),
        "command": "TRAP2_DATA=... python benchmarks/surrogates.py",
        "machine": machine(),
        "versions": versions(),
        "steps": STEPS,
        "bank_steps": BANK_STEPS,
        "seed": SEED,
        "runs": runs,
    }
    write_json(out, record)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
