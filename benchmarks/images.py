"""Three real image tasks on MobileNetV2, each protected in turn with the other two as partners.

    TRAP2_DATA=/path/to/data python benchmarks/images.py

A small network of convolutions and batch norm without attention: fine-tuned in full, plainly (the
control, and the partner of the others) and with the default trap; each protected release is
audited by an attacker who works the batch-norm statistics out again after every merge. Writes
`results/images.json` and `.md`, in the form of `first_bench.py`; `--tasks` and `--seeds` choose,
and what the JSON holds is kept. About forty minutes per task and seed on one core.
"""

import argparse
import os
import sys
from itertools import product
from pathlib import Path
from typing import Any

import first_bench
from first_bench import Bench
from trap2.errors import UserError

RESULTS = first_bench.RESULTS / "images.json"
TASKS = ("kmnist10k", "mnist10k", "fashion_mnist")
# 600 steps at 1e-3 leave it short of what it can learn, and the trap pays for that in points.
STEPS, LEARNING_RATE = 1500, 3e-3


def task_section(data: Path, name: str) -> dict[str, Any]:
    """A task as recipes and audits name it."""
    folder = data / "image" / name
    return {
        "name": name,
        "kind": "image",
        "data": {split: str(folder / f"{split}.parquet") for split in ("train", "test")},
        "classes": [str(label) for label in range(10)],
        "limit": {"validation": 300},
    }


IMAGES = Bench(
    base=lambda data: data / "models" / "mobilenet_v2_0.35",
    tasks=TASKS,
    section=task_section,
    training={"full": {"steps": STEPS, "learning_rate": LEARNING_RATE}},
    attacker={**first_bench.ATTACKER, "precision": "float32", "recompute_statistics": True},
    command="TRAP2_DATA=... python benchmarks/images.py",
)


def main() -> None:
    """Run what is missing, then write the results from what is there."""
    top = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    top.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    top.add_argument("--seeds", nargs="+", type=int, default=[0])
    top.add_argument("--work", type=Path, default=Path("build/images"))
    chosen = top.parse_args()
    data = Path(os.environ.get("TRAP2_DATA", ""))
    if not (data / "image" / TASKS[0]).is_dir():
        sys.exit(f"TRAP2_DATA: no folder {data / 'image'}; set it to the folder of the data")
    for seed, task in product(chosen.seeds, chosen.tasks):
        key = f"full/default/{task}/{seed}"
        if key not in first_bench.known(RESULTS):
            report = first_bench.audited(IMAGES, chosen.work, data, "full", "default", task, seed)
            runs = first_bench.known(RESULTS) | {key: first_bench.summary_of(report)}
            first_bench.write_results(RESULTS, runs, IMAGES, "full/default")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
