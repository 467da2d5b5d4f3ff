"""Labelled rows of a task, from local files, an image folder or a Hub data set."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trap2.errors import UserError
from trap2.recipes import DataSpec, TaskSpec

Split = Literal["train", "validation", "test"]
BUILDERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Rows:
    """Inputs (texts or images) and their class indices, equally many of each."""

    inputs: Sequence[Any]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> "Rows":
        """The first `count` rows."""
        return Rows(self.inputs[:count], self.labels[:count])


def load_rows(task: TaskSpec, split: Split, seed: int = 0) -> Rows:
    """Load one split, shuffled with a generator of our own so that any prefix is a fair sample.

    Validation rows are carved from the training rows where no validation split is given.

    Args:
        task: The task.
        split: Which rows.
        seed: Seed of the shuffle and of the carving.

    Raises:
        UserError: Missing or unreadable file, missing column, empty data, labels outside the head.
    """
    spec = task.data
    if _has(spec, split):
        rows = _read(task, split)
    elif split == "validation" and _has(spec, "train"):
        rows = _carved(task, seed, keep=True)
    else:
        raise UserError(f"task '{task.name}' has no {split} rows; add data.{split} to its recipe")
    carved_from = split == "train" and not _has(spec, "validation")
    rows = _carved(task, seed, keep=False) if carved_from else rows
    if len(rows) == 0:
        raise UserError(
            f"task '{task.name}' has 0 {split} rows after carving {spec.validation_fraction:g} of "
            "train for validation; give more rows or data.validation"
        )
    order = list(range(len(rows)))
    random.Random(f"{seed} {split}").shuffle(order)
    order = order[: task.limit.get(split)]
    return Rows([rows.inputs[i] for i in order], [rows.labels[i] for i in order])


def _has(spec: DataSpec, split: Split) -> bool:
    if spec.imagefolder is not None:
        return (spec.imagefolder / split).is_dir()
    if spec.hub is not None:
        from datasets import get_dataset_split_names

        return split in get_dataset_split_names(spec.hub, spec.hub_config)
    return getattr(spec, split) is not None


def _carved(task: TaskSpec, seed: int, keep: bool) -> Rows:
    """Split the training rows in two by a seeded draw; `keep` gives the validation part."""
    rows = _read(task, "train")
    draw = random.Random(f"{seed} carve")
    chosen = [draw.random() < task.data.validation_fraction for _ in range(len(rows))]
    picked = [i for i, is_validation in enumerate(chosen) if is_validation is keep]
    return Rows([rows.inputs[i] for i in picked], [rows.labels[i] for i in picked])


def _read(task: TaskSpec, split: Split) -> Rows:
    table = _table(task, split)
    column = task.input or task.kind
    for name in (column, task.label):
        if name not in table.column_names:
            raise UserError(
                f"task '{task.name}' has no column '{name}' in its {split} rows, only "
                f"{', '.join(table.column_names)}; set task.input or task.label"
            )
    if len(table) == 0:
        raise UserError(f"task '{task.name}' has 0 {split} rows; give data with rows")
    values = table[task.label]
    names = getattr(table.features[task.label], "names", None)
    if names and {*names} <= {*task.classes}:  # the data's own order may be another than the head's
        values = [value if value is None else names[value] for value in values]
    labels = [_label(value, task, row) for row, value in enumerate(values)]
    try:
        inputs = list(table[column])
    except OSError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"an image of task '{task.name}' ({split}) cannot be read: {reason}; remove or mend it"
        ) from error
    for row, value in enumerate(inputs):
        if not _usable(value, task.kind):
            raise UserError(
                f"row {row} of task '{task.name}' ({split}) holds {value!r} where "
                f"a non-empty {task.kind} is wanted; remove or mend it"
            )
    return Rows(inputs, labels)


def _usable(value: Any, kind: str) -> bool:
    return isinstance(value, str) and bool(value.strip()) if kind == "text" else value is not None


def _label(value: Any, task: TaskSpec, row: int) -> int:
    if isinstance(value, str) and value in task.classes:
        return task.classes.index(value)
    if isinstance(value, int) and 0 <= value < len(task.classes):
        return int(value)
    raise UserError(
        f"row {row} of task '{task.name}' has label {value!r}, outside the head's "
        f"{len(task.classes)} classes (0 to {len(task.classes) - 1}, or their names); "
        "correct the row or task.classes"
    )


def _table(task: TaskSpec, split: Split) -> Any:
    from datasets import Image, disable_progress_bars, load_dataset
    from datasets.exceptions import DatasetGenerationError

    disable_progress_bars()
    spec = task.data
    path: Path | None = getattr(spec, split)
    builder = _builder(path) if path is not None else ""
    try:
        if spec.hub is not None:
            return load_dataset(spec.hub, spec.hub_config, split=split)
        if spec.imagefolder is not None:
            return load_dataset("imagefolder", data_dir=str(spec.imagefolder), split=split)
        table = load_dataset(builder, data_files={split: str(path)}, split=split)
        column = task.input or task.kind
        if task.kind == "image" and column in table.column_names:
            table = table.cast_column(column, Image())
        return table
    except (DatasetGenerationError, StopIteration, ValueError, OSError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300] or "no rows"
        raise UserError(
            f"cannot read the {split} rows of task '{task.name}': {reason}; check the data"
        ) from error


def _builder(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"data file {path} does not exist; check the path")
    if path.suffix not in BUILDERS:
        raise UserError(
            f"data file {path} has suffix '{path.suffix}'; give one of {', '.join(BUILDERS)}"
        )
    return BUILDERS[path.suffix]
