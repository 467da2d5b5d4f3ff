"""Tasks of lm-evaluation-harness: it makes the prompts, runs the model and scores every row."""

import importlib.util
import json
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trap2.errors import UserError
from trap2.tasks.evaluation import Reading, Scored
from trap2.tasks.model import Inputs
from trap2.taskspec import TaskSpec

BATCH = 16
"""Rows per forward pass of the harness."""

FEWSHOT_SEED = 1234
"""The harness's own default: which examples stand in a few-shot prompt."""

Row = tuple[int, str]
"""A row's place in the harness's task, and its content as JSON."""


def harness_rows(task: TaskSpec) -> list[Row]:
    """The rows that the harness evaluates a task on: its test rows, else its validation rows.

    Raises:
        UserError: lm-eval is not installed, has no such task, or cannot read its rows.
    """
    docs = _loaded(task)["tasks"][_name(task)].eval_docs
    return [(place, json.dumps(doc, sort_keys=True)) for place, doc in enumerate(docs)]


class HarnessTask(Reading):
    """Kind `lm_eval`: one metric of the harness, for each row. See `Reading`.

    All rows are read at once: examples of a few-shot prompt are drawn from row to row.
    """

    def __init__(self, inputs: Inputs, rows: Sequence[Row], labels: Sequence[Any]) -> None:
        self.batch_size, self.classes, self.chance = len(rows), 0, 0.0
        self.lengths = [0] * len(rows)
        self._inputs, self._rows, self._loaded = inputs, rows, _loaded(inputs.task)

    def read(self, model: nn.Module, places: Sequence[int]) -> Tensor:
        """The metric (n, 1).

        Raises:
            UserError: The task has no such metric, or not one in [0, 1] for each row.
        """
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        spec = self._inputs.task.lm_eval
        assert spec is not None
        wanted = [self._rows[i][0] for i in places]
        self._loaded["tasks"][spec.task].set_fewshot_seed(FEWSHOT_SEED)
        found = evaluate(
            HFLM(pretrained=model, tokenizer=self._inputs.processor, batch_size=BATCH),
            self._loaded,
            samples={spec.task: sorted(wanted)},
            bootstrap_iters=0,
        )
        samples = sorted(found["samples"][spec.task], key=lambda sample: sample["doc_id"])
        known = dict(zip(sorted(wanted), samples, strict=True))
        scores = [known[row].get(spec.metric) for row in wanted]
        if not all(isinstance(score, int | float) and 0 <= score <= 1 for score in scores):
            metrics = ", ".join(map(str, samples[0]["metrics"]))
            raise UserError(
                f"lm_eval.metric={spec.metric!r} is not a number in [0, 1] for each row of "
                f"'{spec.task}'; its metrics: {metrics}"
            )
        return torch.tensor(scores, dtype=torch.float32)[:, None]

    def evaluation(self, outputs: Tensor) -> Scored:
        """The metric as it is."""
        return Scored(outputs)


def _name(task: TaskSpec) -> str:
    assert task.lm_eval is not None
    return task.lm_eval.task


def _loaded(task: TaskSpec) -> Any:
    """The harness's own task, in the form in which it evaluates tasks."""
    spec = task.lm_eval
    assert spec is not None
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            f"task '{task.name}' needs lm-eval, which is not installed; "
            "pip install 'trap2[lm-eval]'"
        )
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if spec.folder is not None and not spec.folder.is_dir():
        raise UserError(f"lm_eval.folder {spec.folder} is not a folder; check the path")
    manager = TaskManager(include_path=spec.folder, include_defaults=spec.folder is None)
    if spec.task not in manager.all_subtasks:
        where = spec.folder or "lm-eval"
        raise UserError(f"{where} has no task '{spec.task}'; check its name, groups are no tasks")
    try:
        loaded = manager.load([spec.task])
    except (OSError, ValueError, LookupError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"lm-eval cannot read the rows of '{spec.task}': {reason}; check its data"
        ) from error
    own = loaded["tasks"][spec.task]
    if own.get_config("num_fewshot") is None:
        own.set_config("num_fewshot", 0)
    return loaded
