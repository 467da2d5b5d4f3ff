"""Rows from every kind of source, in fair and repeatable splits; one line for what is wrong."""

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trap2.errors import UserError
from trap2.tasks.data import Rows, load_rows
from trap2.taskspec import TaskSpec

CLASSES = ["low", "middle", "high"]
TABLE = [(f"text {i}", CLASSES[i % 3]) for i in range(30)]


def write_csv(path: Path, rows: list[tuple[Any, Any]]) -> None:
    with path.open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["text", "label"])
        table.writerows(rows)


def write_json(path: Path, rows: list[tuple[Any, Any]]) -> None:
    path.write_text(json.dumps([{"text": text, "label": label} for text, label in rows]))


def write_jsonl(path: Path, rows: list[tuple[Any, Any]]) -> None:
    path.write_text("".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in rows))


def write_parquet(path: Path, rows: list[tuple[Any, Any]]) -> None:
    from datasets import Dataset

    Dataset.from_dict({"text": [t for t, _ in rows], "label": [y for _, y in rows]}).to_parquet(
        path
    )


WRITERS: dict[str, Callable[[Path, list[tuple[Any, Any]]], None]] = {
    "csv": write_csv,
    "json": write_json,
    "jsonl": write_jsonl,
    "parquet": write_parquet,
}


def task(data: dict[str, Any], **changes: Any) -> TaskSpec:
    return TaskSpec.model_validate({"name": "t", "data": data, "classes": CLASSES} | changes)


def table(tmp_path: Path, rows: list[tuple[Any, Any]], **changes: Any) -> TaskSpec:
    """A task whose training rows stand in a json-lines file."""
    write_jsonl(tmp_path / "train.jsonl", rows)
    return task({"train": tmp_path / "train.jsonl"}, **changes)


def pairs(rows: Rows) -> list[tuple[Any, int]]:
    return list(zip(rows.inputs, rows.labels, strict=True))


def refusal(spec: TaskSpec, split: Any = "train") -> str:
    with pytest.raises(UserError) as caught:
        load_rows(spec, split)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("by_name", [True, False])
def test_every_file_format_gives_the_same_rows(tmp_path: Path, suffix: str, by_name: bool) -> None:
    rows = [(text, name if by_name else CLASSES.index(name)) for text, name in TABLE]
    for split in ("train", "test"):
        WRITERS[suffix](tmp_path / f"{split}.{suffix}", rows)
    spec = task({split: tmp_path / f"{split}.{suffix}" for split in ("train", "test")})
    found = pairs(load_rows(spec, "test"))
    assert sorted(found) == sorted((text, CLASSES.index(name)) for text, name in TABLE)
    assert [text for text, _ in found] != [text for text, _ in TABLE]  # shuffled


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"question": "why", "answer": "high"}) + "\n")
    spec = task({"test": path}, input="question", label="answer")
    assert pairs(load_rows(spec, "test")) == [("why", 2)]


def test_validation_is_carved_from_train_without_overlap_and_always_the_same(
    tmp_path: Path,
) -> None:
    rows = [(f"text {i}", i % 3) for i in range(200)]
    spec = table(tmp_path, rows)
    train, validation = load_rows(spec, "train", 5), load_rows(spec, "validation", 5)
    assert {*train.inputs}.isdisjoint(validation.inputs)
    assert sorted(pairs(train) + pairs(validation)) == sorted(rows)
    assert 5 <= len(validation) <= 40
    assert pairs(load_rows(spec, "train", 5)) == pairs(train)
    assert pairs(load_rows(spec, "validation", 5)) == pairs(validation)
    assert {*load_rows(spec, "validation", 6).inputs} != {*validation.inputs}
    half = table(tmp_path, rows).model_copy(
        update={"data": spec.data.model_copy(update={"validation_fraction": 0.5})}
    )
    assert 70 <= len(load_rows(half, "validation", 5)) <= 130


def test_a_given_validation_split_leaves_train_whole(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "v.jsonl", TABLE[:5])
    write_jsonl(tmp_path / "t.jsonl", TABLE)
    spec = task({"train": tmp_path / "t.jsonl", "validation": tmp_path / "v.jsonl"})
    assert len(load_rows(spec, "train")) == 30
    assert sorted(load_rows(spec, "validation").inputs) == [text for text, _ in TABLE[:5]]


def test_a_limit_takes_a_prefix_of_the_shuffled_rows(tmp_path: Path) -> None:
    whole = table(tmp_path, TABLE)
    limited = table(tmp_path, TABLE, limit={"train": 4, "validation": 1, "test": 9})
    for split, count in (("train", 4), ("validation", 1)):
        found = load_rows(limited, split, 1)
        assert pairs(found) == pairs(load_rows(whole, split, 1))[:count]
    rows = load_rows(limited, "train", 1)
    assert pairs(rows.first(2)) == pairs(rows)[:2]
    assert len(rows.first(99)) == 4


def test_no_global_stream_is_touched(tmp_path: Path) -> None:
    spec = table(tmp_path, TABLE)
    load_rows(spec, "train")
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    load_rows(spec, "validation", 1)
    after = random.random(), np.random.rand(), torch.rand(1)
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    assert after == (random.random(), np.random.rand(), torch.rand(1))


def test_images_come_from_a_folder_with_the_classes_in_the_order_of_the_task(
    pico_images: Path,
) -> None:
    colours = ["red", "green", "blue"]  # the folders' own order is blue, green, red
    spec = task({"imagefolder": pico_images}, kind="image", classes=colours)
    rows = load_rows(spec, "validation")
    assert len(rows) == 24
    for image, label in pairs(rows):
        assert np.asarray(image).mean((0, 1)).argmax() == label
    assert "has no test rows; add data.test to its recipe" in refusal(spec, "test")


def test_image_folders_with_names_of_their_own_count_in_their_order(pico_images: Path) -> None:
    spec = task({"imagefolder": pico_images}, kind="image", classes=["x", "y", "z"])
    for image, label in pairs(load_rows(spec, "validation")):
        assert 2 - np.asarray(image).mean((0, 1)).argmax() == label


def test_images_may_be_listed_in_a_file(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2), "red").save(tmp_path / "a.png")
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"image": str(tmp_path / "a.png"), "label": 1}) + "\n")
    spec = task({"test": path}, kind="image")
    ((image, label),) = pairs(load_rows(spec, "test"))
    assert image.getpixel((0, 0)) == (255, 0, 0)
    assert label == 1
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    message = refusal(spec, "test")
    assert message.startswith("an image of task 't' (test) cannot be read: ")
    assert message.endswith("; remove or mend it")


@pytest.mark.parametrize("label", ["other", 3, -1, 1.5, None, ""])
def test_a_label_outside_the_head_is_refused(tmp_path: Path, label: Any) -> None:
    same_kind = {str: "low", int: 0, float: 0.5, type(None): None}[type(label)]
    spec = table(tmp_path, [("a", label), ("b", same_kind)])
    assert refusal(spec) == (
        f"row 0 of task 't' has label {label!r}, outside the head's 3 classes (0 to 2, or their "
        "names); correct the row or task.classes"
    )


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    for changes, name in (({"input": "body"}, "body"), ({"label": "y"}, "y")):
        assert refusal(table(tmp_path, TABLE, **changes)) == (
            f"task 't' has no column '{name}' in its train rows, only text, label; set task.input "
            "or task.label"
        )


@pytest.mark.parametrize("text", ["", "  ", None])
def test_an_empty_text_is_refused(tmp_path: Path, text: str | None) -> None:
    assert refusal(table(tmp_path, [("a", 1), (text, 0)])) == (
        f"row 1 of task 't' (train) holds {text!r} where a non-empty text is wanted; remove or "
        "mend it"
    )


def test_an_empty_cell_of_a_csv_is_refused(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", [("a", 1), ("", 0)])
    assert refusal(task({"test": tmp_path / "a.csv"}), "test") == (
        "row 1 of task 't' (test) holds None where a non-empty text is wanted; remove or mend it"
    )


def test_data_without_rows_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "head.parquet", [])
    write_csv(tmp_path / "head.csv", [])
    (tmp_path / "nothing.csv").write_text("")
    (tmp_path / "nothing.jsonl").write_text("")
    for name in ("nothing.csv", "nothing.jsonl", "head.csv", "head.parquet"):
        message = refusal(task({"test": tmp_path / name}), "test")
        assert message == "cannot read the test rows of task 't': no rows; check the data"


def test_a_carve_that_leaves_nothing_is_refused(tmp_path: Path) -> None:
    spec = table(tmp_path, TABLE[:2])
    assert refusal(spec, "validation") == (
        "task 't' has 0 validation rows after carving 0.1 of train for validation; give more rows "
        "or data.validation"
    )
    assert len(load_rows(spec, "train")) == 2


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    for name, content in (("a.jsonl", b'{"text": "a", '), ("a.parquet", b"PAR1 not really")):
        (tmp_path / name).write_bytes(content)
        message = refusal(task({"test": tmp_path / name}), "test")
        assert message.startswith("cannot read the test rows of task 't': ")
        assert message.endswith("; check the data")


def test_a_file_that_is_not_there_or_unknown_is_refused(tmp_path: Path) -> None:
    missing, unknown = tmp_path / "no.csv", tmp_path / "a.xlsx"
    unknown.write_text("")
    assert refusal(task({"train": missing})) == (
        f"data file {missing} does not exist; check the path"
    )
    assert refusal(task({"train": unknown})) == (
        f"data file {unknown} has suffix '.xlsx'; give one of .csv, .json, .jsonl, .parquet, .txt"
    )
    assert refusal(task({"train": missing}), "test") == (
        "task 't' has no test rows; add data.test to its recipe"
    )
