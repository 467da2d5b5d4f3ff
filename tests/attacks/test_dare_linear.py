"""DARE with a sum: by hand, in expectation, and what it is without a drop."""

import pytest
import torch

from trap2.attacks.attack import merge
from trap2.attacks.dare import keep_mask
from trap2.errors import UserError


def dare(updates, coefficients, drop, seed=0):
    return dict(merge("dare_linear", updates, coefficients, drop=drop, seed=seed))["w"]


def test_by_hand():
    one, two = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[4.0, 3.0], [2.0, 1.0]])
    masks = [keep_mask(one, 0.5, f"7 {index} w") for index in range(2)]
    expected = 0.5 * 2 * one * masks[0] - 1.0 * 2 * two * masks[1]
    assert torch.equal(dare([{"w": one}, {"w": two}], [0.5, -1.0], 0.5, seed=7), expected)
    assert 0 < sum(int(mask.sum()) for mask in masks) < 8


def test_without_a_drop_it_is_task_arithmetic_and_on_average_too():
    one, two = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    updates = [{"w": one}, {"w": two}]
    plain = dict(merge("task_arithmetic", updates, 0.6))["w"]
    torch.testing.assert_close(dare(updates, 0.6, 0.0), plain)
    mean = sum(dare(updates, 0.6, 0.5, seed) for seed in range(2000)) / 2000
    torch.testing.assert_close(mean, plain, rtol=0, atol=0.15)


def test_a_drop_of_everything_is_refused():
    with pytest.raises(UserError, match="drop=1 leaves nothing to rescale; use 0 <= drop < 1"):
        dare([{"w": torch.ones(2)}], 1.0, 1)
