"""The Karcher mean by hand, between two models, and against mergekit."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trap2.attacks.attack import merge

QUICK = settings(deadline=None, max_examples=30)


def karcher(updates, coefficients):
    return dict(merge("karcher", [{"w": u} for u in updates], coefficients))["w"]


def test_by_hand():
    # (3, 0) and (0, 4): half way between the directions, at the mean length 3.5.
    one, two = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    half = math.sqrt(0.5)
    torch.testing.assert_close(karcher([one, two], 1.0), 3.5 * torch.tensor([half, half]))
    # With c = (1, 3) three quarters of the right angle, at length (3 + 12) / 2.
    angle = math.radians(67.5)
    expected = 7.5 * torch.tensor([math.cos(angle), math.sin(angle)])
    torch.testing.assert_close(karcher([one, two], [1.0, 3.0]), expected)
    # A negative coefficient turns its update around.
    expected = 3.5 * torch.tensor([half, -half])
    torch.testing.assert_close(karcher([one, two], [1.0, -1.0]), expected)


def test_right_angles_keep_their_length():
    merged = karcher(list(2 * torch.eye(3)), 1.0)
    torch.testing.assert_close(merged, torch.full((3,), 2 / math.sqrt(3)))


def test_updates_that_cancel_out_have_no_direction():
    one = torch.tensor([1.0, 2.0])
    assert torch.equal(karcher([one, -one], 1.0), torch.zeros(2))
    assert torch.equal(karcher([one, one], 0.0), torch.zeros(2))


def test_zero_updates_shorten_and_dropped_ones_do_not():
    one, two = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    expected = karcher([one, two], [1.0, 0.5])
    torch.testing.assert_close(karcher([one, torch.ones(2), two], [1.0, 0.0, 0.5]), expected)
    shorter = karcher([one, torch.zeros(2), two], [1.0, 1.0, 0.5])
    torch.testing.assert_close(shorter, 2 / 3 * expected)
    only = dict(merge("karcher", [{"a": one}, {"b": two}], 1.0))
    torch.testing.assert_close(only["b"], two / 2)


@QUICK
@given(st.integers(0, 99), st.floats(-3, 3, width=32))
def test_one_model_order_and_common_factor(seed, c):
    rows = list(torch.randn(3, 7, generator=torch.Generator().manual_seed(seed)))
    torch.testing.assert_close(karcher(rows[:1], 1.0), rows[0])
    weights = [1.0, 0.5, 0.8]
    once = karcher(rows, weights)
    torch.testing.assert_close(karcher(rows[::-1], weights[::-1]), once, rtol=0, atol=1e-5)
    torch.testing.assert_close(karcher(rows, c), c * karcher(rows, 1.0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_equals_mergekit(count):
    module = pytest.importorskip("mergekit.merge_methods.karcher")
    generator = torch.Generator().manual_seed(count)
    updates = list(torch.randn(count, 5, 4, generator=generator).double())
    alphas = torch.rand(count, generator=generator).double()
    alphas = (alphas / alphas.sum()).tolist()
    theirs = module.karcher_merge_tensors(updates, alphas, max_iter=100, tol=1e-9)
    ours = karcher(updates, [count * alpha for alpha in alphas])
    torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=1e-5)
