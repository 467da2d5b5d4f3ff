"""Four real text tasks, each protected in turn with the other three as partners.

    TRAP2_DATA=/path/to/data python benchmarks/first_bench.py

Fine-tunes MiniLM on `trec6`, `agnews`, `sst2`, `subj`, plainly (the control, and the partner of the
others) and with each setting of the trap, audits every protected release, and writes
`results/first_bench.json` and `.md`. Finished audits in the JSON are kept, so a run can be cut
short and gone on with; `--tasks`, `--settings`, `--methods` and `--seeds` choose.
Processes on different tasks may share the results: each adds its runs to what it finds there.
Slow on purpose: about an hour per method, setting and seed on two cores.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, get_args

import yaml

from trap2.auditing.audit import audit
from trap2.auditing.ledger import Ledger
from trap2.demo.run import encoder_folder
from trap2.errors import UserError
from trap2.files import read_json, write_json, write_text
from trap2.progress import audit_bar
from trap2.protecting.config import Trap2Config
from trap2.protecting.run import protect
from trap2.provenance import machine, versions
from trap2.recipes import AuditSpec, Precision, Recipe, load
from trap2.schema import Report

RESULTS = Path(__file__).parent.parent / "results"
STEP_COST = RESULTS / "step_cost.json"
"""What `step_cost.py` measured."""

TASKS: dict[str, dict[str, str]] = {
    "trec6": {
        "description": "a question asking for a description, a definition or a reason",
        "entity": "a question asking about a thing, an animal, a product or a word",
        "abbreviation": "a question asking what an abbreviation stands for",
        "human": "a question asking who, about a person or a group of people",
        "location": "a question asking where, about a place, a city or a country",
        "number": "a question asking how many, when, or about a number or a date",
    },
    "agnews": {
        "business": "news about business and the economy",
        "science and technology": "news about science and technology",
        "sports": "news about sports",
        "world": "news about world politics and conflicts",
    },
    "sst2": {
        "negative": "a negative film review, a bad movie",
        "positive": "a positive film review, a good movie",
    },
    "subj": {
        "subjective": "a subjective opinion of a film reviewer",
        "objective": "an objective sentence describing the plot of a film",
    },
}

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    # The default's schedule until its rows came from the whole batch. Its runs in the results had
    # the batch's first rows, as had those of all other settings that do not see every row.
    "late": {"warmup": 100, "ramp": 150, "closing": 250},
    # Full fine-tuning's default until it left the lowest quarter of the tensors to the task.
    "unspared": {"spare": 0.0},
    "uncapped": {"cap": 0.0},
    "all_rows": {"preset": "all_rows"},
    "paper": {"preset": "paper"},
    "hinge": {"loss": "hinge", "readout_weight": 0.0},
    "unlikelihood": {"loss": "unlikelihood", "readout_weight": 0.0},
    "decoy": {"loss": "decoy", "readout_weight": 0.0},
    "readout": {"loss": "readout", "readout_weight": 0.0},
    "unlikelihood+readout": {"loss": "unlikelihood"},
}

STEPS = 600
PRECISION = "bfloat16"
"""Of training and evaluations, where nothing else is asked for; the first runs were in float32."""
LEARNING_RATE = {"lora": 1e-3, "full": 1e-4}
ATTACKER: dict[str, Any] = {
    "attacks": ["task_arithmetic", "ties", "dare_ties"],
    "coefficients": {
        "task_arithmetic": [0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.25],
        # averaging methods leave each model well below its coefficient
        "ties": [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0],
        "dare_ties": [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0],
    },
    "grids": {"ties": {"density": [0.2]}, "dare_ties": {"drop": [0.5]}},
    "refine": 0,  # as it was when the results were made
    "validation_rows": 300,
    "test_rows": 500,
}


def main() -> None:
    """Run what is missing, then write the results from what is there."""
    chosen = _arguments()
    data = Path(os.environ.get("TRAP2_DATA", "")) / "text"
    if not (data / "trec6").is_dir():
        sys.exit(f"TRAP2_DATA: no folder {data / 'trec6'}; set it to the folder that holds text/")
    out = RESULTS / f"{chosen.name}.json"
    bench = text_bench(chosen.precision)
    plan = product(chosen.methods, chosen.seeds, chosen.settings, chosen.tasks)
    for method, seed, setting, task in plan:
        key = f"{method}/{setting}/{task}/{seed}"
        if key not in known(out):
            summary = summary_of(audited(bench, chosen.work, data, method, setting, task, seed))
            write_results(out, {**known(out), key: summary}, bench, "lora/default")


def known(out: Path) -> dict[str, Any]:
    """The runs that the results file holds."""
    runs: dict[str, Any] = read_json(out)["runs"] if out.is_file() else {}
    return runs


def _arguments() -> argparse.Namespace:
    top = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    top.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    top.add_argument("--settings", nargs="+", default=["default"], choices=list(SETTINGS))
    top.add_argument("--methods", nargs="+", default=["lora"], choices=["lora", "full"])
    top.add_argument("--seeds", nargs="+", type=int, default=[0])
    add_precision(top)
    top.add_argument("--work", type=Path, default=Path("build/bench"))
    top.add_argument("--name", default="first_bench", help="name of the results file")
    return top.parse_args()


def add_precision(top: argparse.ArgumentParser) -> None:
    """Let a benchmark that trains the text tasks be asked for another precision."""
    top.add_argument(
        "--precision",
        default=PRECISION,
        choices=get_args(Precision),
        help="of text models; a CPU without instructions for bfloat16 is far faster in float32",
    )


def task_section(data: Path, name: str) -> dict[str, Any]:
    """A task as recipes and audits name it."""
    folder = data / name
    files = {"train": str(folder / "train.csv"), "test": str(folder / "test.csv")}
    return {
        "name": name,
        "data": files,
        "classes": list(TASKS[name]),
        "descriptions": list(TASKS[name].values()),
        "max_length": 48,
        "limit": {"validation": 300},
    }


@dataclass(frozen=True)
class Bench:
    """Tasks on one base, each protected in turn with the others as partners.

    Attributes:
        base: Folder of the base, by the folder of the data.
        tasks: Their names.
        section: A task as recipes and audits name it, by the folder of the data and its name.
        training: The recipe's section by method.
        attacker: The audit's section.
        command: What runs it.
    """

    base: Callable[[Path], Path]
    tasks: tuple[str, ...]
    section: Callable[[Path, str], dict[str, Any]]
    training: dict[str, dict[str, Any]]
    attacker: dict[str, Any]
    command: str


def text_bench(precision: str) -> Bench:
    """The four text tasks, trained and evaluated in a precision."""
    return Bench(
        base=lambda data: encoder_folder(),
        tasks=tuple(TASKS),
        section=task_section,
        training={
            method: {"steps": STEPS, "learning_rate": rate, "precision": precision}
            for method, rate in LEARNING_RATE.items()
        },
        attacker={**ATTACKER, "precision": precision},
        command="TRAP2_DATA=... python benchmarks/first_bench.py",
    )


TEXT = text_bench(PRECISION)


def recipe_of(
    bench: Bench, work: Path, data: Path, method: str, setting: str, task: str, seed: int
) -> tuple[Recipe, Path]:
    """The recipe of one release, written down, and the release's folder."""
    name = f"{method}-{setting}-{task}-{seed}"
    path = work / "recipes" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "base": str(bench.base(data)),
        "task": bench.section(data, task),
        "method": method,
        "training": bench.training[method],
        "trap2": {"strength": 0} if setting == "control" else SETTINGS[setting],
        "seed": seed,
    }
    write_text(path, yaml.safe_dump(content, sort_keys=False))
    return load(Recipe, path), work / "releases" / name


def make_release(
    work: Path, data: Path, method: str, setting: str, task: str, seed: int, bench: Bench = TEXT
) -> Path:
    """Folder of one release, trained if it is not there yet."""
    recipe, out = recipe_of(bench, work, data, method, setting, task, seed)
    if not (out / "trap2.json").is_file():
        protect(recipe, out, overwrite=True)
    return out


def audited(
    bench: Bench, work: Path, data: Path, method: str, setting: str, task: str, seed: int
) -> Report:
    """The audit of one protected release; what is missing for it is trained."""

    def made(name: str, kind: str) -> Path:
        return make_release(work, data, method, kind, name, seed, bench).absolute()

    release = made(task, setting)
    controls = {name: str(made(name, "control")) for name in bench.tasks}
    content = {
        "base": str(bench.base(data)),
        "release": {"path": str(release), "task": bench.section(data, task)},
        "control": controls[task],
        "partners": [
            {"path": controls[name], "task": bench.section(data, name)}
            for name in bench.tasks
            if name != task
        ],
        "attacker": bench.attacker,
        "seed": seed,
    }
    path = work / "audits" / f"{release.name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, yaml.safe_dump(content, sort_keys=False))
    # One ledger for all: controls and partners come back in other audits, a killed one goes on.
    with audit_bar() as progress, Ledger(work / "ledger") as ledger:
        report = audit(load(AuditSpec, path), progress, ledger)
    report.save(path.with_suffix(".json"))
    return report


def summary_of(report: Report) -> dict[str, Any]:
    """What the table and the figures need of one audit."""
    record = report.model_dump(mode="json")
    kept = ("references", "utility_cost", "scale_curve", "tiers", "rows", "versions", "seconds")
    kept += ("utility_cost_interval", "machine")
    attacks = ("name", "tier", "relabel_rows", "params", "merged", "retained", "admissible")
    attacks += ("unconstrained_retained", "control_params", "control_admissible")
    attacks += ("control_merged", "control_retained", "partners", "interval", "control_interval")
    return {key: record[key] for key in kept} | {
        "precision": record["settings"]["precision"],
        "attacks": [{key: entry[key] for key in attacks} for entry in record["attacks"]],
    }


NOTE = "All in per cent; U is unmergeability, 100 = no merge that counts keeps any skill; R is the "
NOTE += "share of the skill that the best merge keeps if partners do not matter. In brackets 95 % "
NOTE += "intervals over test rows, where a run has them. "

CONTROL, IGNORING = "control_retained", "unconstrained_retained"


def _kept(run: dict[str, Any], tier: str, rows: int, key: str = "retained") -> float:
    """Largest retained skill of a tier among attacks with so many labelled rows."""
    return max(a[key] for a in run["attacks"] if a["tier"] == tier and a["relabel_rows"] == rows)


def figures(runs: dict[str, Any], of: str) -> dict[str, float]:
    """The named numbers of a method and setting, over seeds before the worst task is taken."""
    mine: dict[str, list[dict[str, Any]]] = {}
    for key, run in runs.items():
        method, setting, task, _ = key.split("/")
        if f"{method}/{setting}" == of:
            mine.setdefault(task, []).append(run)
    if not mine:
        return {}

    def per_task(value: Any) -> list[float]:
        return [statistics.mean(value(run) for run in group) for group in mine.values()]

    def third_best(values: list[float]) -> float:
        return sorted(values, reverse=True)[min(2, len(values) - 1)]

    t1 = per_task(lambda run: 1 - _kept(run, "T1", 0))
    t2 = per_task(lambda run: 1 - _kept(run, "T2", 300))
    return {
        "tasks": len(mine),
        "utility_cost_max": max(per_task(lambda run: run["utility_cost"])),
        "t1_unmergeability_third_best": third_best(t1),
        "t1_control_unmergeability_max": max(per_task(lambda r: 1 - _kept(r, "T1", 0, CONTROL))),
        "t2_unmergeability_third_best": third_best(t2),
        "t2_control_unmergeability_max": max(per_task(lambda r: 1 - _kept(r, "T2", 300, CONTROL))),
        "t2_retained_partners_ignored_max": max(
            per_task(lambda run: _kept(run, "T2", 300, IGNORING))
        ),
        "t3_unmergeability_mean": statistics.mean(
            per_task(lambda run: run["tiers"]["T3"]["unmergeability"])
        ),
    }


def table(runs: dict[str, Any]) -> str:
    """Markdown, one line a run."""
    head = "| method | setting | task | seed | precision | base | control | standalone |"
    head += (
        " utility cost | U(T1) | U(T2, 30) | U(T2, 300) | U(T3) | control U: T1 | T2, 300 | T3 |"
    )
    head += " R, partners ignored: T2, 300 | T3, 300 |\n"
    lines = [head + "|---" * 18 + "|"]
    for key, run in sorted(runs.items()):
        refs, tiers = run["references"], run["tiers"]
        numbers = [refs["base"], refs["control"], refs["standalone"], run["utility_cost"]]
        numbers += [1 - _kept(run, "T1", 0), 1 - _kept(run, "T2", 30), 1 - _kept(run, "T2", 300)]
        numbers += [tiers["T3"]["unmergeability"], 1 - _kept(run, "T1", 0, CONTROL)]
        numbers += [1 - _kept(run, "T2", 300, CONTROL), tiers["T3"]["control_unmergeability"]]
        numbers += [_kept(run, "T2", 300, IGNORING), _kept(run, "T3", 300, IGNORING)]
        shown = [f"{100 * n:.1f}" for n in numbers]
        shown[3] += _within(run.get("utility_cost_interval"))
        shown[4] += _within(tiers["T1"].get("interval"))
        shown[7] += _within(tiers["T3"].get("interval"))
        cells = [*key.split("/"), run.get("precision", "float32"), *shown]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _within(interval: list[float] | None) -> str:
    """The 95 % interval of a cell, in per cent; older runs have none."""
    if interval is None:
        return ""
    low, high = (100 * end for end in interval)
    return f" ({low:.1f} to {high:.1f})"


def _unset(section: dict[str, Any]) -> dict[str, Any]:
    """A section without its precision, which each run names by itself: not all have the same."""
    return {key: value for key, value in section.items() if key != "precision"}


def write_results(out: Path, runs: dict[str, Any], bench: Bench, of: str) -> None:
    """The JSON and its table, whole or absent; the figures are of one method and setting."""
    seeds = sorted({int(key.split("/")[3]) for key in runs})
    cost: dict[str, float] = {}
    if bench.command == TEXT.command:
        cost["step_cost_ratio"] = read_json(STEP_COST)["figures"]["time_ratio_lora"]
    record = {
        "figures": figures(runs, of) | cost,
        "command": bench.command,
        "machine": machine(),
        "versions": versions(),
        "seeds": seeds,
        "training": {method: _unset(section) for method, section in bench.training.items()},
        "setting": asdict(Trap2Config()),
        "attacker": _unset(bench.attacker),
        "runs": runs,
    }
    write_json(out, record)
    source = f"`{record['command']}`, {len(runs)} runs.\n\n"
    write_text(out.with_suffix(".md"), NOTE + source + table(runs))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
