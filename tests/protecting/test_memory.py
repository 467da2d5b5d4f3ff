"""Symbols: n rows at hand, at s; k_i weight of a remembered row; Z logits; Y one-hot labels."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trap2.protecting.losses import Outcome, readout
from trap2.protecting.memory import WIDTH, RowMemory


def rows(count: int, classes: int, seed: int) -> Outcome:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, classes, (count,), generator=generator)
    return Outcome(torch.zeros(()), logits.requires_grad_(), labels)


def gradient(value: Tensor, outcome: Outcome) -> Tensor:
    assert outcome.logits is not None
    return torch.autograd.grad(value, outcome.logits)[0]


def joined(*outcomes: Outcome) -> Outcome:
    logits = torch.cat([o.logits.detach() for o in outcomes if o.logits is not None])
    labels = torch.cat([o.labels for o in outcomes if o.labels is not None])
    return Outcome(torch.zeros(()), logits.requires_grad_(), labels)


@given(st.integers(1, 9), st.integers(2, 5), st.integers(0, 1000))
def test_without_memory_it_is_the_plain_read_out(count: int, classes: int, seed: int) -> None:
    forgetful, fresh = RowMemory(0), RowMemory(50)
    for step in range(3):
        outcome = rows(count, classes, seed + step)
        assert torch.equal(forgetful.readout(outcome, 0.5), readout(outcome))
    outcome = rows(count, classes, seed)
    torch.testing.assert_close(fresh.readout(outcome, 0.5), readout(outcome))
    assert forgetful.state_dict() == {}


def test_remembered_rows_of_the_same_scale_stand_in_for_a_larger_batch() -> None:
    memory = RowMemory(100)
    old, new = rows(20, 4, 0), rows(5, 4, 1)
    memory.readout(old, 0.7)
    together = joined(new, old)
    value = memory.readout(new, 0.7)
    torch.testing.assert_close(value, readout(together))
    torch.testing.assert_close(  # per row n of n + k: so many times the share they have in it
        gradient(value, new), gradient(readout(together), together)[:5] * (25 / 5)
    )


def test_rows_of_other_scales_count_by_their_distance() -> None:
    memory = RowMemory(100)
    old, new = rows(20, 3, 0), rows(6, 3, 1)
    memory.readout(old, 0.5)
    k = math.exp(-(0.15**2) / (2 * WIDTH**2))
    # by hand: weighted ridge regression of the labels on the outputs
    both = joined(new, old)
    assert both.logits is not None
    assert both.labels is not None
    w = np.array([1.0] * 6 + [k] * 20)
    Z, Y = both.logits.detach().numpy(), np.eye(3)[both.labels.numpy()]
    Z, Y = Z - np.average(Z, axis=0, weights=w), Y - np.average(Y, axis=0, weights=w)
    root = np.sqrt(w)[:, None]
    eps = 0.01 * np.square(root * Z).sum(0).mean()
    B = np.linalg.solve(Z.T @ (w[:, None] * Z) + eps * np.eye(3), Z.T @ (w[:, None] * Y))
    expected = np.trace(Y.T @ (w[:, None] * Z) @ B) / np.trace(Y.T @ (w[:, None] * Y))
    assert memory.readout(new, 0.65).item() == pytest.approx(expected, rel=1e-9)


def test_rows_of_far_scales_do_not_count() -> None:
    memory = RowMemory(100)
    memory.readout(rows(20, 3, 0), 1.4)
    new = rows(6, 3, 1)
    torch.testing.assert_close(memory.readout(new, 0.5), readout(new))


def test_few_rows_of_many_classes_need_it() -> None:
    """Six rows of noise look explained; with enough remembered ones they do not."""
    memory = RowMemory(600)
    alone = [memory.readout(rows(6, 6, seed), 0.5).item() for seed in range(100)]
    assert alone[0] > 0.8
    assert alone[-1] < 0.05


def test_the_newest_rows_are_kept_and_a_resumed_memory_goes_on_as_before() -> None:
    memory = RowMemory(10)
    for seed in range(5):
        memory.readout(rows(4, 3, seed), 0.5 + 0.01 * seed)
    state = memory.state_dict()
    assert {key: len(value) for key, value in state.items()} == {
        "logits": 10, "labels": 10, "scales": 10,
    }  # fmt: skip
    assert state["scales"].tolist() == pytest.approx([0.52] * 2 + [0.53] * 4 + [0.54] * 4)
    resumed = RowMemory(10)
    resumed.load_state_dict(state)
    assert torch.equal(resumed.readout(rows(4, 3, 9), 0.5), memory.readout(rows(4, 3, 9), 0.5))


def test_no_gradient_reaches_what_is_remembered_and_positions_without_a_target_are_left_out() -> (
    None
):
    memory = RowMemory(10)
    old = rows(4, 3, 0)
    memory.readout(old, 0.5)
    nothing = Outcome(torch.zeros(()), torch.zeros(3, 3), torch.full((3,), -100))
    assert memory.readout(nothing, 0.5).item() == 0.0
    assert len(memory.state_dict()["labels"]) == 4
    new = rows(4, 3, 1)
    memory.readout(new, 0.5).backward()
    assert old.logits is not None
    assert new.logits is not None
    assert old.logits.grad is None
    assert new.logits.grad is not None
