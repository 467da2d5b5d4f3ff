"""What the cap does in training: utility and leak along runs with it, without it, and stronger.

    TRAP2_DATA=/path/to/data python benchmarks/controller.py

Fine-tunes MiniLM with LoRA on a task of `first_bench.py`, plainly and with four traps: strength
.3 (the default's) and 1, each with the default's cap and without; `--work` may be the folder of
that bench. Writes `results/controller.json` and draws `docs/controller.png` from it: the nominal
loss, accuracy on validation rows at the release's own scale, and the most that re-labelling reads
at other scales. Some ten minutes per run on one core.
"""

import argparse
import os
import statistics
import sys
from itertools import product
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

import first_bench
from trap2.files import read_json, write_json
from trap2.provenance import machine, versions

OUT = first_bench.RESULTS / "controller.json"
PICTURE = first_bench.RESULTS.parent / "docs" / "controller.png"
TASKS = ("sst2",)
SETTINGS: dict[str, dict[str, Any]] = {
    "control": {},
    "default": {},
    "strong": {"strength": 1.0},
    "uncapped": {"cap": 0.0},
    "uncapped_strong": {"cap": 0.0, "strength": 1.0},
}
LINES = {
    "control": ("no trap", "0.45", "-"),
    "default": ("cap 1, strength .3 (default)", "tab:blue", "-"),
    "strong": ("cap 1, strength 1", "tab:blue", "--"),
    "uncapped": ("no cap, strength .3", "tab:red", "-"),
    "uncapped_strong": ("no cap, strength 1", "tab:red", "--"),
}
WINDOW = 3
"""Logged values that a point of the loss is the mean of."""


def main() -> None:
    """Train what is missing, write what the runs logged, and draw it."""
    top = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    top.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(first_bench.TASKS))
    top.add_argument("--seed", type=int, default=0)
    first_bench.add_precision(top)
    top.add_argument("--work", type=Path, default=Path("build/bench"))
    chosen = top.parse_args()
    data = Path(os.environ.get("TRAP2_DATA", "")) / "text"
    if not (data / TASKS[0]).is_dir():
        sys.exit(f"TRAP2_DATA: no folder {data / TASKS[0]}; set it to the folder that holds text/")
    first_bench.SETTINGS.update(SETTINGS)
    bench, runs = first_bench.text_bench(chosen.precision), {}
    for task, setting in product(chosen.tasks, SETTINGS):
        of = (chosen.work, data, "lora", setting, task, chosen.seed, bench)
        runs[f"{task}/{setting}"] = course(first_bench.make_release(*of))
    record = {
        "command": "TRAP2_DATA=... python benchmarks/controller.py",
        "machine": machine(),
        "versions": versions(),
        "seeds": [chosen.seed],
        "settings": SETTINGS,
        "runs": runs,
    }
    write_json(OUT, record)
    drawn(runs).savefig(PICTURE, dpi=110)


def course(release: Path) -> dict[str, Any]:
    """What a run logged, and what was read off its checkpoints."""
    record = read_json(release / "trap2.json")
    keys = ("step", "loss", "trap2/trap_loss", "trap2/kept", "trap2/conflict")
    history, rows = record["validation"]["history"], record["validation"]["rows"]
    log = [{key: entry[key] for key in keys if key in entry} for entry in record["log"]]
    base = history[0]["base_leak"]
    return {"log": log, "checkpoints": history, "base_leak": base, "validation_rows": rows}


def drawn(runs: dict[str, Any]) -> Figure:
    """A row of three panels for each task."""
    tasks = [*dict.fromkeys(key.split("/")[0] for key in runs)]
    figure = Figure(figsize=(11, 3.1 * len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), 3, squeeze=False)
    for task, (loss, utility, leak) in zip(tasks, panels, strict=True):
        for setting, (label, colour, dashes) in LINES.items():
            run = runs[f"{task}/{setting}"]
            look = {"color": colour, "linestyle": dashes, "label": label}
            loss.plot(*_losses(run["log"]), **look)
            for axes, key in ((utility, "utility"), (leak, "leak")):
                seen = [point for point in run["checkpoints"] if point[key] is not None]
                axes.plot([p["step"] for p in seen], [p[key] for p in seen], marker=".", **look)
        base = runs[f"{task}/default"]["base_leak"]
        leak.axhline(base, color="0.45", linestyle=":", label="the base, re-labelled")
        _named(loss, f"{task}: task loss in training")
        _named(utility, f"{task}: accuracy at scale 1")
        _named(leak, f"{task}: most that re-labelling\nreads at other scales")
    panels[0][0].legend(fontsize=7)
    panels[0][2].legend(fontsize=7, handles=[panels[0][2].lines[-1]])
    return figure


def _losses(log: list[dict[str, float]]) -> tuple[list[float], list[float]]:
    """Steps, and means of the logged losses up to each."""
    seen = [entry for entry in log if "loss" in entry]
    means = [
        statistics.mean(entry["loss"] for entry in seen[max(0, end - WINDOW) : end])
        for end in range(1, len(seen) + 1)
    ]
    return [entry["step"] for entry in seen], means


def _named(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)


if __name__ == "__main__":
    main()
