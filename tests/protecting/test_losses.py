"""Symbols: N rows, C classes; Z logits (N, C); Y one-hot labels, both centred in the read-out."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from trap2.errors import UserError
from trap2.protecting.losses import (
    DECOY_CLASS,
    HINGE_CAP,
    IGNORED,
    READ,
    TRAP_LOSSES,
    Outcome,
    ascent,
    decoy,
    hinge,
    readout,
    unlikelihood,
)

ROW_LOSSES = ("unlikelihood", "decoy", "readout")


def outcome(logits: Tensor, labels: Tensor) -> Outcome:
    return Outcome(torch.zeros(()), logits, labels)


@st.composite
def rows(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    n, c = draw(st.integers(1, 12)), draw(st.integers(2, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    logits = torch.randn(n, c, generator=generator, dtype=torch.float64) * draw(
        st.floats(0.5, 20.0)
    )
    return logits, torch.randint(0, c, (n,), generator=generator)


def ridge_r2(logits: np.ndarray, labels: np.ndarray) -> float:
    """Y'Z B / Y'Y with B the ridge solution by least squares on an augmented system."""
    Z = logits - logits.mean(0)
    Y = np.eye(logits.shape[1])[labels]
    Y = Y - Y.mean(0)
    eps = 0.01 * np.square(Z).sum(0).mean()
    padded = np.vstack([Z, math.sqrt(eps) * np.eye(Z.shape[1])])
    B = np.linalg.lstsq(padded, np.vstack([Y, np.zeros((Z.shape[1], Y.shape[1]))]))[0]
    return float(np.trace(Y.T @ Z @ B) / np.trace(Y.T @ Y))


def test_the_registry_holds_the_published_losses() -> None:
    assert list(TRAP_LOSSES) == ["ascent", "decoy", "hinge", "readout", "unlikelihood"]


@given(st.floats(-10, 50))
def test_scalar_losses_match_their_formulas(loss: float) -> None:
    given_ = Outcome(torch.tensor(loss, dtype=torch.float64))
    assert ascent(given_).item() == -loss
    assert hinge(given_).item() == max(0.0, HINGE_CAP - loss)


def test_hinge_has_no_gradient_beyond_its_cap() -> None:
    below, above = (torch.tensor(v, requires_grad=True) for v in (1.0, HINGE_CAP + 1))
    hinge(Outcome(below)).backward()
    hinge(Outcome(above)).backward()
    assert (below.grad, above.grad) == (torch.tensor(-1.0), torch.tensor(0.0))


@given(rows())
def test_unlikelihood_is_minus_log_of_one_minus_the_probability(data: tuple) -> None:
    logits, labels = data
    p = logits.softmax(1)[torch.arange(len(labels)), labels]
    rest = logits.softmax(1).scatter(1, labels[:, None], 0.0).sum(1)  # 1 - p, exact for p near 1
    torch.testing.assert_close(unlikelihood(outcome(logits, labels)), -rest.log().mean())
    if p.max() < 0.99:
        torch.testing.assert_close(unlikelihood(outcome(logits, labels)), -(1 - p).log().mean())


def test_unlikelihood_stays_finite_when_the_model_is_certain() -> None:
    logits = torch.tensor([[2000.0, 0.0, 0.0]], requires_grad=True)
    value = unlikelihood(outcome(logits, torch.tensor([0])))
    value.backward()
    assert value.item() == pytest.approx(2000.0 - math.log(2))
    torch.testing.assert_close(logits.grad, torch.tensor([[1.0, -0.5, -0.5]]))
    closed = unlikelihood(outcome(torch.tensor([[-2000.0, 0.0, 0.0]]), torch.tensor([0])))
    assert closed.item() == pytest.approx(0.0, abs=1e-6)


@given(rows())
def test_decoy_is_cross_entropy_to_one_class_whatever_the_labels(data: tuple) -> None:
    logits, labels = data
    expected = -logits.log_softmax(1)[:, DECOY_CLASS].mean()
    torch.testing.assert_close(decoy(outcome(logits, labels)), expected)
    assert torch.equal(decoy(outcome(logits, labels)), decoy(outcome(logits, labels.roll(1))))


@given(rows())
def test_readout_is_the_ridge_r2_of_the_labels_on_the_outputs(data: tuple) -> None:
    logits, labels = data
    value = readout(outcome(logits, labels)).item()
    if len(labels.unique()) < 2:
        assert value == 0.0
        return
    assert value == pytest.approx(ridge_r2(logits.numpy(), labels.numpy()), rel=1e-7, abs=1e-9)
    assert 0.0 <= value <= 1.0


@given(rows(), st.floats(0.1, 100.0), st.floats(-30.0, 30.0), st.randoms(use_true_random=False))
def test_readout_ignores_shift_size_and_order_of_the_outputs(
    data: tuple, size: float, shift: float, random: object
) -> None:
    logits, labels = data
    order = torch.tensor(random.sample(range(logits.shape[1]), logits.shape[1]))  # type: ignore[attr-defined]
    moved = size * logits[:, order] + shift * torch.arange(logits.shape[1])
    value = readout(outcome(logits, labels))
    torch.testing.assert_close(readout(outcome(moved, labels)), value, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(  # naming the classes otherwise changes nothing either
        readout(outcome(logits, order[labels])), value, rtol=1e-9, atol=1e-12
    )


def test_readout_knows_separable_from_unrelated_outputs() -> None:
    labels = torch.arange(64) % 4
    assert readout(outcome(5 * F.one_hot(labels).float(), labels)).item() > 0.95
    noise = torch.randn(4096, 4, generator=torch.Generator().manual_seed(0))
    assert readout(outcome(noise, torch.arange(4096) % 4)).item() < 0.01
    assert readout(outcome(torch.ones(64, 4), labels)).item() == 0.0


def test_readout_takes_a_vocabulary_of_outputs() -> None:
    logits = torch.randn(6, 100_000, requires_grad=True)  # a C x C system would take 40 GB
    value = readout(outcome(logits, torch.arange(6) * 1000))
    value.backward()
    assert 0.9 < value.item() <= 1.0
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("name", ROW_LOSSES)
def test_gradients_are_finite_in_degenerate_batches(name: str) -> None:
    cases = {
        "one row": (torch.randn(1, 3), torch.tensor([1])),
        "one class": (torch.randn(5, 3), torch.full((5,), 2)),
        "constant outputs": (torch.ones(6, 3), torch.arange(6) % 3),
        "fewer rows than classes": (torch.randn(3, 50), torch.arange(3)),
        "huge outputs": (1e4 * torch.randn(6, 3), torch.arange(6) % 3),
        "no target at all": (torch.randn(4, 3), torch.full((4,), IGNORED)),
    }
    for case, (logits, labels) in cases.items():
        logits.requires_grad_()
        value = TRAP_LOSSES.get(name)(outcome(logits, labels))
        value.backward()
        assert value.isfinite(), case
        assert logits.grad is not None, case
        assert logits.grad.isfinite().all(), case


def test_of_many_tokens_the_read_out_sees_some_from_all_over_the_pass() -> None:
    labels = torch.tensor([[IGNORED, 0, 1, IGNORED, 2, 3, 4, 5, 6, IGNORED, 7]])
    few = Outcome(torch.zeros(()), torch.eye(11)[None], labels, shifted=False)
    assert few.rows(4)[1].tolist() == [1, 3, 5, 7]
    assert few.rows(4)[0].argmax(1).tolist() == [2, 5, 7, 10]
    assert few.rows(3)[1].tolist() == [1, 4, 6]
    assert few.rows(99)[1].tolist() == few.rows()[1].tolist() == list(range(8))
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2 * READ, 5, generator=generator), torch.arange(2 * READ) % 5
    assert float(readout(outcome(logits, labels))) == pytest.approx(
        ridge_r2(logits[1::2].numpy(), labels[1::2].numpy()), abs=1e-4
    )


def test_without_targets_there_is_nothing_to_trap() -> None:
    nothing = outcome(torch.randn(4, 3), torch.full((4,), IGNORED))
    assert [TRAP_LOSSES.get(name)(nothing).item() for name in ROW_LOSSES] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", ROW_LOSSES)
def test_tokens_are_shifted_and_ignored_positions_left_out(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, generator=generator)
    labels = torch.randint(0, 7, (2, 5), generator=generator)
    labels[0, :3] = IGNORED
    kept = [(r, t) for r in range(2) for t in range(4) if labels[r, t + 1] != IGNORED]
    flat = torch.stack([logits[r, t] for r, t in kept])
    targets = torch.stack([labels[r, t + 1] for r, t in kept])
    assert len(kept) == 6
    loss = TRAP_LOSSES.get(name)
    assert torch.equal(loss(outcome(logits, labels)), loss(outcome(flat, targets)))


@pytest.mark.parametrize("name", ROW_LOSSES)
def test_half_precision_outputs_are_judged_in_full_precision(name: str) -> None:
    logits, labels = torch.randn(8, 3).bfloat16(), torch.arange(8) % 3
    loss = TRAP_LOSSES.get(name)
    value = loss(outcome(logits, labels))
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(outcome(logits.float(), labels)))
    assert loss(outcome(logits.double(), labels)).dtype == torch.float64


@pytest.mark.parametrize("name", ROW_LOSSES)
def test_autocast_does_not_change_a_trap_loss(name: str) -> None:
    logits, labels = torch.randn(8, 3), torch.arange(8) % 3
    expected = TRAP_LOSSES.get(name)(outcome(logits, labels))
    with torch.autocast("cpu", torch.bfloat16):
        value = TRAP_LOSSES.get(name)(outcome(logits, labels))
    assert torch.equal(value, expected)


@pytest.mark.parametrize("name", ROW_LOSSES)
@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        (None, torch.ones(2, dtype=torch.long)),
        (torch.ones(2, 2), None),
        (torch.ones(2, 2), torch.ones(2)),
        (torch.ones(2, 3, 4), torch.ones(2, 3, 4)),
    ],
)
def test_models_without_class_probabilities_are_sent_to_hinge(
    name: str, logits: Tensor | None, labels: Tensor | None
) -> None:
    with pytest.raises(
        UserError, match="logits and labels of the same rows, the model gives none; "
    ):
        TRAP_LOSSES.get(name)(Outcome(torch.zeros(()), logits, labels))
    with pytest.raises(UserError, match="use loss=hinge"):
        TRAP_LOSSES.get(name)(Outcome(torch.zeros(()), logits, labels))
