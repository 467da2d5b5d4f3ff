"""Evaluation keeps the order of the rows, counts what is broken as wrong, and leaves no trace."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

import pico
from trap2.tasks.data import Rows
from trap2.tasks.evaluate import Evaluator
from trap2.tasks.evaluation import Classification
from trap2.tasks.model import Inputs, build, load_encoder
from trap2.taskspec import TaskSpec

TEXTS = [" ".join(pico.WORDS[i : i + 1 + (7 * i) % 9]) for i in range(13)]


@pytest.fixture(scope="module")
def parts(pico_base: Path) -> tuple[nn.Module, Inputs]:
    spec = TaskSpec.model_validate(pico.task("t", {"train": "unused.csv"}))
    inputs = Inputs(pico_base, spec)
    return build(pico_base, spec, load_encoder(pico_base), inputs), inputs


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_rows_keep_their_order_although_batched_by_length(
    parts: tuple[nn.Module, Inputs], batch_size: int
) -> None:
    model, inputs = parts
    rows = Rows(TEXTS, [i % 3 for i in range(len(TEXTS))])
    result = Evaluator(model, inputs, rows, batch_size=batch_size)()
    assert result.logits.dtype == torch.float32
    assert result.labels.tolist() == rows.labels
    for text, logits in zip(TEXTS, result.logits, strict=True):
        with torch.no_grad():
            alone = model(**inputs.batch(inputs.encode([text]))).logits[0]
        assert torch.allclose(alone, logits, atol=1e-4)


def test_in_bfloat16_the_model_runs_under_autocast_and_its_weights_stay(
    parts: tuple[nn.Module, Inputs],
) -> None:
    model, inputs = parts
    rows = Rows(TEXTS[:4], [0] * 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    exact, mixed = (Evaluator(model, inputs, rows, p)().logits for p in ("float32", "bfloat16"))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        order = sorted(range(4), key=lambda i: len(inputs.encode([TEXTS[i]])[0]))
        by_hand = model(**inputs.batch(inputs.encode([TEXTS[i] for i in order]))).logits
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed[order], by_hand.float())
    assert not torch.equal(exact, mixed)
    assert torch.allclose(exact, mixed, atol=0.3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
def test_it_evaluates_without_dropout_and_restores_the_mode(
    parts: tuple[nn.Module, Inputs], training: bool
) -> None:
    model, inputs = parts
    evaluator = Evaluator(model, inputs, Rows(TEXTS, [0] * len(TEXTS)))
    model.eval()
    reference = evaluator().logits
    model.train(training)
    state = torch.get_rng_state()
    first, second = evaluator().logits, evaluator().logits
    assert torch.equal(first, reference)
    assert torch.equal(second, reference)
    assert all(module.training is training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert not first.requires_grad
    model.eval()


def test_it_sees_the_model_as_it_is_now(parts: tuple[nn.Module, Inputs]) -> None:
    _, inputs = parts

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.answer = nn.Parameter(torch.tensor([1.0, 0, 0]))

        def forward(self, input_ids: torch.Tensor, **_: torch.Tensor) -> SequenceClassifierOutput:
            return SequenceClassifierOutput(logits=self.answer.expand(len(input_ids), -1))

    model = Constant()
    evaluator = Evaluator(model, inputs, Rows(TEXTS[:4], [0, 0, 0, 2]))
    assert evaluator().accuracy == 0.75
    with torch.no_grad():
        model.answer[2] = 5
    assert evaluator().accuracy == 0.25


@given(
    rows=st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=12),
    broken=st.sampled_from([float("nan"), float("inf"), -float("inf")]),
)
def test_a_broken_row_counts_as_wrong(rows: list[tuple[int, bool]], broken: float) -> None:
    labels = torch.tensor([label for label, _ in rows])
    logits = torch.eye(4)[labels]
    for row, (label, whole) in enumerate(rows):
        if not whole:
            logits[row, (label + 1) % 4] = broken
    right = sum(whole for _, whole in rows)
    assert Classification(logits, labels).accuracy == pytest.approx(right / len(rows))


def test_accuracy_and_loss_by_hand() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    result = Classification(logits, torch.tensor([0, 1, 1]))
    soft = [torch.log1p(torch.exp(torch.tensor(-margin))) for margin in (2.0, 1.0, -3.0)]
    assert result.accuracy == pytest.approx(2 / 3)
    assert result.loss == pytest.approx(float(sum(soft)) / 3)
