"""Tasks of lm-eval: its own numbers for each row, on a merged model, and ours where both know."""

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from trap2.auditing.contents import _judge
from trap2.errors import UserError
from trap2.tasks.data import Rows, load_rows
from trap2.tasks.evaluate import Evaluator
from trap2.tasks.model import Inputs, load_encoder
from trap2.taskspec import TaskSpec

INSTALLED = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not INSTALLED, reason="lm-eval is not installed")
COUNT = 20

YAML = """
task: counting
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: options
doc_to_target: label
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""


def docs() -> list[dict[str, Any]]:
    draw = random.Random(0)
    words = [f"w{i}" for i in range(2, 24)]
    return [
        {
            "prompt": " ".join(draw.sample(words, draw.randint(2, 5))),
            "options": [" ".join(draw.sample(words, 1 + i)) for i in range(3)],
            "label": draw.randrange(3),
        }
        for _ in range(COUNT)
    ]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A task of one's own, whose data lie beside it; nothing is asked of any hub."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(doc) + "\n" for doc in docs()))
    (tmp_path / "counting.yaml").write_text(YAML.replace("ROWS", str(rows)))
    return tmp_path


def spec(place: Path, **changes: Any) -> TaskSpec:
    asked = {"task": "counting", "folder": place, **changes}
    return TaskSpec.model_validate({"name": "t", "kind": "lm_eval", "lm_eval": asked})


@needs_harness
@pytest.mark.parametrize(("metric", "normal"), [("acc", False), ("acc_norm", True)])
def test_the_harness_and_our_own_choice_agree(
    pico_llama: Path, folder: Path, metric: str, normal: bool
) -> None:
    model = load_encoder(pico_llama, language=True)
    task = spec(folder, metric=metric)
    rows = load_rows(task, "test")
    found = Evaluator(model, Inputs(pico_llama, task), rows)()
    ours = TaskSpec.model_validate(
        {
            "name": "t",
            "kind": "choice",
            "data": {"test": "unused"},
            "length_normalised": normal,
        }
    )
    same = [json.loads(text) for _, text in rows.inputs]
    pairs = Rows([(d["prompt"], tuple(d["options"])) for d in same], [d["label"] for d in same])
    wanted = Evaluator(model, Inputs(pico_llama, ours), pairs)()
    assert torch.equal(found.scores, wanted.scores)
    assert 0 < found.accuracy < 1
    assert found.loss == pytest.approx(1 - found.accuracy)
    assert not model.training


@needs_harness
def test_its_rows_are_parted_between_tuning_and_scoring(folder: Path) -> None:
    task = spec(folder)
    halves = [load_rows(task, split, seed=1).inputs for split in ("validation", "test")]
    assert sorted([*halves[0], *halves[1]]) == sorted(
        (place, json.dumps(doc, sort_keys=True)) for place, doc in enumerate(docs())
    )
    assert len(halves[0]) == len(halves[1]) == COUNT // 2
    assert load_rows(task, "test", seed=2).inputs != halves[1]
    with pytest.raises(UserError) as caught:
        load_rows(task, "train")
    assert str(caught.value) == (
        "task 't' has no train rows: lm-eval's 20 are parted between validation and test; train "
        "with another task"
    )


@needs_harness
def test_metric_version_and_task_files_are_in_the_key(folder: Path) -> None:
    before = _judge(spec(folder))
    assert before == _judge(spec(folder))
    assert before != _judge(spec(folder, metric="acc_norm"))
    file = folder / "counting.yaml"
    file.write_text(file.read_text().replace("{{prompt}}", "{{prompt}} w2"))
    assert before != _judge(spec(folder))


@needs_harness
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"task": "nothing"}, "has no task 'nothing'; check its name, groups are no tasks"),
        ({"folder": Path("nowhere")}, "lm_eval.folder nowhere is not a folder; check the path"),
    ],
)
def test_a_task_that_is_not_there_is_refused(
    folder: Path, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError) as caught:
        load_rows(spec(folder, **changes), "test")
    assert str(caught.value).endswith(reason)


@needs_harness
def test_rows_that_cannot_be_read_are_refused(folder: Path) -> None:
    (folder / "rows.jsonl").unlink()
    with pytest.raises(UserError, match=r"^lm-eval cannot read the rows of 'counting': "):
        load_rows(spec(folder), "test")


@needs_harness
def test_a_metric_that_the_task_has_not_got_is_refused(pico_llama: Path, folder: Path) -> None:
    task = spec(folder, metric="f1")
    model = load_encoder(pico_llama, language=True)
    with pytest.raises(UserError) as caught:
        Evaluator(model, Inputs(pico_llama, task), load_rows(task, "test"))()
    assert str(caught.value) == (
        "lm_eval.metric='f1' is not a number in [0, 1] for each row of 'counting'; its metrics: "
        "acc, acc_norm"
    )


@pytest.mark.skipif(INSTALLED, reason="lm-eval is installed")
def test_without_the_harness_it_says_what_to_install(folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_rows(spec(folder), "test")
    assert str(caught.value) == (
        "task 't' needs lm-eval, which is not installed; pip install 'trap2[lm-eval]'"
    )


def test_it_goes_with_its_kind_and_brings_its_own_rows(folder: Path) -> None:
    with pytest.raises(ValueError, match="kind lm_eval reads its own rows; remove data"):
        TaskSpec.model_validate(
            {
                **spec(folder).model_dump(exclude={"function"}),
                "data": {"test": "rows.jsonl"},
            }
        )
    with pytest.raises(ValueError, match=r"task\.lm_eval and kind: lm_eval go together"):
        TaskSpec.model_validate({"name": "t", "kind": "lm_eval"})
