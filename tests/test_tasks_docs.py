"""The examples of docs/tasks.md: each is a task that can be evaluated as it stands."""

import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import pico
from trap2.tasks.data import load_rows
from trap2.tasks.evaluate import READINGS, Evaluator
from trap2.tasks.model import Inputs, build, load_encoder
from trap2.taskspec import TaskSpec

TEXT = (Path(__file__).parent.parent / "docs" / "tasks.md").read_text(encoding="utf-8")
EXAMPLES = {
    example["kind"]: example
    for example in map(yaml.safe_load, re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.DOTALL))
}
(CODE,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)

ROW = {"prompt": "w2 w3", "completion": "w4", "options": ["w4", "w5 w6"], "label": 0}
HARNESS = """
task: counting
dataset_path: json
dataset_kwargs: {data_files: {test: quiz.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: options
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pico_images: Path) -> Iterator[Path]:
    """A folder with every file that the examples name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for path in pico.write_task(tmp_path / "texts", rows=12).values():
        named = dict(enumerate(EXAMPLES["text"]["classes"]))
        lines = Path(path).read_text().splitlines()
        rows = [line.rsplit(",", 1) for line in lines[1:]]
        written = [f"{text},{named[int(label)]}" for text, label in rows]
        (tmp_path / Path(path).name).write_text("\n".join([lines[0], *written]) + "\n")
    shutil.copytree(pico_images, "images")
    for name in ("proofs", "sums", "quiz"):
        Path(f"{name}.jsonl").write_text((json.dumps(ROW) + "\n") * 6)
    Path("style.csv").write_text("text,label\nw2 w3,w3\nw2 w3,w4\n")
    Path("my_metrics.py").write_text(CODE)
    Path("my_tasks").mkdir()
    Path("my_tasks/counting.yaml").write_text(HARNESS)
    yield tmp_path
    sys.modules.pop("my_metrics", None)


def test_every_kind_has_an_example() -> None:
    assert {*EXAMPLES} == {*READINGS}


@pytest.mark.parametrize("kind", READINGS)
def test_the_example_is_evaluated(
    kind: str, here: Path, pico_base: Path, pico_vit: Path, pico_llama: Path
) -> None:
    if kind == "lm_eval" and importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm-eval is not installed")
    task = TaskSpec.model_validate(EXAMPLES[kind])
    base = {"text": pico_base, "image": pico_vit}.get(kind, pico_llama)
    inputs, encoder = Inputs(base, task), load_encoder(base, task.is_language)
    split: Any = "validation" if kind == "image" else "test"
    found = Evaluator(build(base, task, encoder, inputs), inputs, load_rows(task, split))()
    assert len(found.scores) == len(load_rows(task, split))
    assert 0 <= found.accuracy <= 1
    assert found.loss >= 0
    if kind == "function":
        assert found.accuracy == 0.5
