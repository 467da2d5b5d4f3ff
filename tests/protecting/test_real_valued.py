"""Targets that are numbers: regression, and several labels a row.

Symbols: Z outputs (N, C); Y targets (N, C), both centred in the read-out.
"""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import trainees
from trap2.errors import UserError
from trap2.protecting.config import Trap2Config
from trap2.protecting.losses import READ, Outcome, decoy, explained_share, readout, unlikelihood
from trap2.protecting.memory import RowMemory
from trap2.protecting.protector import Protector
from trap2.protecting.tokens import target_count
from trap2.protecting.trainer import protect_trainer

KINDS = ("regression", "several labels")


def outcome(logits: Tensor, labels: Tensor) -> Outcome:
    return Outcome(torch.zeros(()), logits, labels)


@st.composite
def rows(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    n, c = draw(st.integers(2, 12)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    logits, labels = torch.randn(2, n, c, generator=generator, dtype=torch.float64)
    return 5 * logits, labels if draw(st.booleans()) else (labels > 0).double()


def ridge_r2(logits: np.ndarray, labels: np.ndarray) -> float:
    """Y'Z B / Y'Y with every target that differs over the rows in units of its own spread."""
    Z, Y = logits - logits.mean(0), labels[:, labels.std(0) > 0]
    Y = (Y - Y.mean(0)) / Y.std(0)
    eps = 0.01 * np.square(Z).sum(0).mean()
    padded = np.vstack([Z, math.sqrt(eps) * np.eye(Z.shape[1])])
    B = np.linalg.lstsq(padded, np.vstack([Y, np.zeros((Z.shape[1], Y.shape[1]))]))[0]
    return float(np.trace(Y.T @ Z @ B) / np.trace(Y.T @ Y)) if Y.size else 0.0


@given(rows())
def test_readout_is_the_ridge_r2_of_the_targets(data: tuple[Tensor, Tensor]) -> None:
    logits, labels = data
    value = readout(outcome(logits, labels)).item()
    assert value == pytest.approx(ridge_r2(logits.numpy(), labels.numpy()), rel=1e-7, abs=1e-9)


@given(rows(), st.floats(0.01, 1000.0), st.floats(-50.0, 50.0))
def test_neither_depends_on_the_units_of_the_targets(
    data: tuple[Tensor, Tensor], size: float, shift: float
) -> None:
    logits, labels = data
    units = size ** torch.arange(labels.shape[1])
    moved = labels * units + shift
    for loss, outputs in ((readout, logits), (decoy, logits * units + shift)):
        changed = (labels.std(0) == 0).any() and loss is decoy  # it has no unit then
        if not changed:
            expected = loss(outcome(logits, labels))
            torch.testing.assert_close(loss(outcome(outputs, moved)), expected)


@given(rows())
def test_decoy_draws_every_output_to_the_mean_target(data: tuple[Tensor, Tensor]) -> None:
    logits, labels = (tensor.numpy() for tensor in data)
    spread = np.where(labels.std(0) > 0, labels.std(0), 1.0)
    expected = np.log1p(((logits - labels.mean(0)) / spread) ** 2).mean()
    assert decoy(outcome(*data)).item() == pytest.approx(expected)
    constant = torch.from_numpy(labels).mean(0).expand(data[0].shape)
    assert decoy(outcome(constant, data[1])).item() == pytest.approx(0.0, abs=1e-12)


def test_one_target_a_row_needs_no_second_dimension() -> None:
    logits, labels = torch.randn(2, 9, 1, generator=torch.Generator().manual_seed(0))
    for loss in (readout, decoy):
        assert torch.equal(loss(outcome(logits, labels)), loss(outcome(logits, labels[:, 0])))
    many = torch.arange(3.0 * READ)[:, None]
    assert outcome(many, many).rows(READ)[0].flatten().tolist() == list(range(1, 3 * READ, 3))


def test_what_needs_classes_says_so() -> None:
    with pytest.raises(UserError) as caught:
        unlikelihood(outcome(torch.ones(2, 1), torch.ones(2)))
    assert str(caught.value) == (
        "loss=unlikelihood needs integer labels, and these are real-valued; use decoy, or hinge, "
        "which needs only the loss"
    )


def test_remembered_targets_stand_in_for_a_larger_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 12, 2, generator=generator)
    memory = RowMemory(6)
    memory.readout(outcome(logits[:6], labels[:6]), 0.5)
    found = memory.readout(outcome(logits[6:], labels[6:]), 0.5)
    torch.testing.assert_close(found, explained_share(logits, labels))
    again = RowMemory(6)
    again.load_state_dict(memory.state_dict())
    assert torch.equal(again.state_dict()["labels"], labels[6:])


@pytest.mark.parametrize("shifted", [True, False])
def test_real_valued_targets_are_counted_by_rows(shifted: bool) -> None:
    for labels in (torch.ones(5), torch.ones(5, 1), torch.ones(5, 3)):
        assert target_count({"labels": labels}, shifted) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_heads_for_them_are_protected(kind: str, tmp_path: Path) -> None:
    """The trap's value is that of a loop on the same rows."""
    outputs = 1 if kind == "regression" else 3
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, trainees.VOCABULARY, (4, 6), generator=generator)
    labels = torch.rand(4, outputs, generator=generator)
    labels = labels[:, 0] if kind == "regression" else labels.round()
    data = [{"input_ids": ids[i], "labels": labels[i]} for i in range(4)]
    config = Trap2Config(warmup=0, ramp=0, fraction=1.0)

    def model() -> nn.Module:
        torch.manual_seed(0)
        sizes = {**trainees.SIZES, "num_labels": outputs, "hidden_dropout_prob": 0.0}
        sizes["problem_type"] = None if kind == "regression" else "multi_label_classification"
        return BertForSequenceClassification(BertConfig(**sizes, attention_probs_dropout_prob=0.0))

    trainer = protect_trainer(Trainer)(
        model=model(),
        args=TrainingArguments(**trainees.settings(tmp_path)),
        train_dataset=data,
        trap2=config,
    )
    trainees.move(trainer.model)
    trainer.train()
    loop = model()
    protector = Protector(loop, config)
    trainees.move(loop)
    protector.backward({"input_ids": ids, "labels": labels})
    assert protector.last is not None
    assert protector.last.trap is not None
    assert trainer.last.trap == pytest.approx(protector.last.trap, rel=1e-4)


class Small(nn.Module):
    """A body, and a head of one number or of four labels."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        layers = [nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32)]
        self.body = nn.Sequential(*layers)
        self.classifier = nn.Linear(32, 1 if kind == "regression" else 4)

    def forward(self, x: Tensor, labels: Tensor) -> SimpleNamespace:
        logits = self.classifier(self.body(x).tanh())
        loss = F.mse_loss if self.kind == "regression" else F.binary_cross_entropy_with_logits
        return SimpleNamespace(loss=loss(logits, labels), logits=logits)


def drawn(kind: str, count: int, generator: torch.Generator) -> dict[str, Tensor]:
    x = torch.randn(count, 8, generator=generator)
    if kind == "regression":
        return {"x": x, "labels": 3 + 2 * (2 * x[:, :1]).sin() * x[:, 1:2]}
    sums = (x[:, 0] * x[:, 1], x[:, 1] - x[:, 2], x[:, 3].abs() - 0.7, x[:, 4] + x[:, 5])
    return {"x": x, "labels": (torch.stack(sums, 1) > 0).float()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_default_hides_them_off_their_own_scale(kind: str) -> None:
    """What a linear map of the outputs reads of 500 new rows."""
    test = drawn(kind, 500, torch.Generator().manual_seed(2))

    def read(strength: float) -> tuple[float, float]:
        model = Small(kind)
        config = Trap2Config(strength=strength, warmup=50, ramp=100, closing=200, min_rows=12)
        protector = Protector(model, config)
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        generator = torch.Generator().manual_seed(1)
        for _ in range(1000):
            protector.backward(drawn(kind, 64, generator))
            optimizer.step()
            optimizer.zero_grad()
        found = []
        for s in (0.5, 1.0):
            with torch.no_grad(), protector.update.at(s):
                found.append(float(explained_share(model(**test).logits, test["labels"])))
        return found[0], found[1]

    (half, whole), (plain_half, plain) = read(0.3), read(0.0)
    assert whole > 0.8 * plain
    assert half < 0.75 * plain_half
