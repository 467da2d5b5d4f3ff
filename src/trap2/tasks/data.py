"""Rows of a task, from local files, an image folder, a Hub data set or lm-eval."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trap2.errors import UserError
from trap2.tasks.harness import harness_rows
from trap2.taskspec import CLASSIFIED, DataSpec, TaskSpec

Split = Literal["train", "validation", "test"]
BUILDERS = {
    **{".csv": "csv", ".json": "json", ".jsonl": "json"},
    **{".parquet": "parquet", ".txt": "text"},
}
EMPTY = ("corresponds to no data", "No columns to parse", "BatchSize must be greater than 0")
"""How its readers say that a file has no rows."""

TEXTS = ("text", "language", "generation", "choice")
"""Kinds whose inputs are texts."""

COMPLETED = ("language", "generation")
"""Kinds whose labels are texts too."""


@dataclass(frozen=True)
class Rows:
    """Inputs and what is right for them, equally many of each.

    Attributes:
        inputs: Texts, images or prompts; of a choice (prompt, options).
        labels: Indices of the right class or option; of a language model the completions.
    """

    inputs: Sequence[Any]
    labels: list[Any]

    def __len__(self) -> int:
        return len(self.inputs)

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
    rows = _harness(task, split, seed) if task.data is None else _own(task, task.data, split, seed)
    order = list(range(len(rows)))
    random.Random(f"{seed} {split}").shuffle(order)
    order = order[: task.limit.get(split)]
    return Rows([rows.inputs[i] for i in order], [rows.labels[i] for i in order])


def _own(task: TaskSpec, spec: DataSpec, split: Split, seed: int) -> Rows:
    """The rows of one split, in the order of the data."""
    if _has(spec, split):
        rows = _read(task, spec, split)
    elif split == "validation" and _has(spec, "train"):
        rows = _carved(task, spec, seed, keep=True)
    else:
        raise UserError(f"task '{task.name}' has no {split} rows; add data.{split} to its recipe")
    carved_from = split == "train" and not _has(spec, "validation")
    rows = _carved(task, spec, seed, keep=False) if carved_from else rows
    if len(rows) == 0:
        raise UserError(
            f"task '{task.name}' has 0 {split} rows after carving {spec.validation_fraction:g} of "
            "train for validation; give more rows or data.validation"
        )
    return rows


def _harness(task: TaskSpec, split: Split, seed: int) -> Rows:
    """Half of the rows that lm-eval evaluates on: one to tune on, the other to be scored on."""
    rows = harness_rows(task)
    random.Random(f"{seed} halves").shuffle(rows)
    half = rows[::2] if split == "test" else rows[1::2]
    if split == "train" or not half:
        raise UserError(
            f"task '{task.name}' has no {split} rows: lm-eval's {len(rows)} are parted between "
            "validation and test; train with another task"
        )
    return Rows(half, [None] * len(half))


def _has(spec: DataSpec, split: Split) -> bool:
    if spec.imagefolder is not None:
        return (spec.imagefolder / split).is_dir()
    if spec.hub is not None:
        from datasets import get_dataset_split_names

        return split in get_dataset_split_names(spec.hub, spec.hub_config)
    return getattr(spec, split) is not None


def _carved(task: TaskSpec, spec: DataSpec, seed: int, keep: bool) -> Rows:
    """Split the training rows in two by a seeded draw; `keep` gives the validation part."""
    rows = _read(task, spec, "train")
    draw = random.Random(f"{seed} carve")
    chosen = [draw.random() < spec.validation_fraction for _ in range(len(rows))]
    picked = [i for i, is_validation in enumerate(chosen) if is_validation is keep]
    return Rows([rows.inputs[i] for i in picked], [rows.labels[i] for i in picked])


def _read(task: TaskSpec, spec: DataSpec, split: Split) -> Rows:
    table = _table(task, spec, split)
    column, label = task.columns
    if task.kind == "language" and column not in table.column_names and task.input is None:
        texts = _column(task, table, "text", split)  # plain text is a completion of nothing
        return Rows([""] * len(texts), texts)
    inputs = _column(task, table, column, split)
    values = _column(task, table, label, split, given=task.kind in COMPLETED)
    if task.kind in ("function", *COMPLETED):
        return Rows(inputs, values)
    names = getattr(table.features[label], "names", None)
    if names and {*names} <= {*task.classes}:  # the data's own order may be another than the head's
        values = [value if value is None else names[value] for value in values]
    if task.kind != "choice":
        return Rows(inputs, [_label(v, task.classes, task, row) for row, v in enumerate(values)])
    options = [task.classes] * len(inputs) if task.classes else _options(task, table, split)
    right = zip(values, options, strict=True)
    labels = [_label(v, among, task, row) for row, (v, among) in enumerate(right)]
    return Rows(list(zip(inputs, map(tuple, options), strict=True)), labels)


def _options(task: TaskSpec, table: Any, split: Split) -> list[list[str]]:
    """The options of every row of a choice."""
    found = _column(task, table, task.options, split, given=False)
    for row, options in enumerate(found):
        sound = isinstance(options, list) and len(options) > 1 and all(map(_is_text, options))
        if not sound:
            raise UserError(
                f"row {row} of task '{task.name}' ({split}) has options {options!r}; a list of two "
                "texts or more is wanted: mend it, or give task.classes for all rows"
            )
    return found


def _column(task: TaskSpec, table: Any, name: str, split: Split, given: bool = True) -> list[Any]:
    """The values of one column; with `given`, none of them may be missing or blank."""
    if name not in table.column_names:
        raise UserError(
            f"task '{task.name}' has no column '{name}' in its {split} rows, only "
            f"{', '.join(table.column_names)}; set task.input or task.label"
        )
    if len(table) == 0:
        raise UserError(f"task '{task.name}' has 0 {split} rows; give data with rows")
    try:
        values = list(table[name])
    except OSError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"an image of task '{task.name}' ({split}) cannot be read: {reason}; remove or mend it"
        ) from error
    for row, value in enumerate(values if given else ()):
        if not _usable(value, task.kind):
            what = task.kind if task.kind in CLASSIFIED else "text"
            raise UserError(
                f"row {row} of task '{task.name}' ({split}) holds {value!r} where "
                f"a non-empty {what} is wanted; remove or mend it"
            )
    return values


def _usable(value: Any, kind: str) -> bool:
    return _is_text(value) if kind in TEXTS else value is not None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _label(value: Any, classes: Sequence[str], task: TaskSpec, row: int) -> int:
    if isinstance(value, str) and value in classes:
        return classes.index(value)
    if isinstance(value, int) and 0 <= value < len(classes):
        return int(value)
    last = len(classes) - 1
    if task.kind == "choice":
        raise UserError(
            f"row {row} of task '{task.name}' has label {value!r}, which is none of its options "
            f"(0 to {last}, or their texts); correct the row"
        )
    raise UserError(
        f"row {row} of task '{task.name}' has label {value!r}, outside the head's "
        f"{len(classes)} classes (0 to {last}, or their names); correct the row or task.classes"
    )


def _table(task: TaskSpec, spec: DataSpec, split: Split) -> Any:
    from datasets import Image, disable_progress_bars, load_dataset
    from datasets.exceptions import DatasetGenerationError

    disable_progress_bars()
    path: Path | None = getattr(spec, split)
    builder = _builder(path) if path is not None else ""
    try:
        if spec.hub is not None:
            return load_dataset(spec.hub, spec.hub_config, split=split)
        if spec.imagefolder is not None:
            return load_dataset("imagefolder", data_dir=str(spec.imagefolder), split=split)
        settings = {"sample_by": "paragraph"} if builder == "text" else {}
        table = load_dataset(builder, data_files={split: str(path)}, split=split, **settings)
        if task.kind == "image" and task.columns[0] in table.column_names:
            table = table.cast_column(task.columns[0], Image())
        return table
    except (DatasetGenerationError, StopIteration, ValueError, OSError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        if not reason or any(said in reason for said in EMPTY):
            reason = "no rows"
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
