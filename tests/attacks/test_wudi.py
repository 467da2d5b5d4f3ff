"""WUDI by hand, at its minimum, and where gradient steps lead."""

import pytest
import torch

from trap2.attacks.attack import merge
from trap2.attacks.wudi import least_interference
from trap2.errors import UserError


def wudi(matrices, coefficients, pull=0.0):
    return dict(merge("wudi", [{"w": m} for m in matrices], coefficients, pull=pull))["w"]


def diagonal(*entries):
    return torch.diag(torch.tensor(entries))


def test_by_hand():
    # T'T / |T|^2 of diag(2, 0) is diag(1, 0), of diag(1, 3) it is diag(.1, .9). Column by column:
    # (2 * 1 + 1 * .1) / 1.1 and (0 + 3 * .9) / .9
    merged = wudi([diagonal(2.0, 0.0), diagonal(1.0, 3.0)], 1.0)
    torch.testing.assert_close(merged, diagonal(2.1 / 1.1, 3.0))


def test_by_hand_with_a_pull():
    # S = diag(3, 3), and sum (T - S) G = diag((2 - 3) * 1 + (1 - 3) * .1, 0) = diag(-1.2, 0), so
    # with G + .1 I = diag(1.2, 1): diag(3 - 1, 3)
    merged = wudi([diagonal(2.0, 0.0), diagonal(1.0, 3.0)], 1.0, 0.1)
    torch.testing.assert_close(merged, diagonal(2.0, 3.0))


def test_a_large_pull_leaves_the_sum_and_one_model_stays_whatever_the_pull():
    one, two = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(wudi([one, two], 1.0, 1e6), one + two, rtol=0, atol=1e-4)
    for pull in (0.0, 0.1, 10.0):
        torch.testing.assert_close(wudi([one], 1.0, pull), one, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="pull=-1 pushes away from the sum; use 0 or more, such as"):
        wudi([one], 1.0, -1)


def test_updates_that_do_not_meet_are_added_up():
    one, two = diagonal(2.0, 0.0), diagonal(0.0, 5.0)
    torch.testing.assert_close(wudi([one, two], [0.5, 1.0]), diagonal(1.0, 5.0))


def loss(merged, updates):
    return sum(((merged - t) @ t.T).square().sum() / t.square().sum() for t in updates)


@pytest.mark.parametrize("rank", [2, 12])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.7, -0.4, 1.0]])
def test_nothing_is_lower_nearby_and_gradient_steps_from_the_sum_lead_there(rank, weights):
    generator = torch.Generator().manual_seed(rank)
    lefts = torch.randn(3, 16, rank, generator=generator)
    matrices = lefts @ torch.randn(3, rank, 12, generator=generator)
    scaled = [w * m.double() for w, m in zip(weights, matrices, strict=True)]
    ours = wudi(list(matrices), weights).double().requires_grad_()
    (slope,) = torch.autograd.grad(loss(ours, scaled), ours)
    assert float(slope.norm()) < 1e-5 * float(ours.detach().norm())
    moving = sum(scaled).clone().requires_grad_()
    for _ in range(3000):
        (slope,) = torch.autograd.grad(loss(moving, scaled), moving)
        moving = (moving - 0.4 * slope).detach().requires_grad_()
    torch.testing.assert_close(moving.detach(), ours.detach(), rtol=0, atol=1e-3)


def test_equal_coefficients_are_a_common_factor_and_zero_drops_a_model():
    matrices = list(torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0)))
    two = wudi(matrices[:2], 1.0)
    torch.testing.assert_close(wudi([*matrices[:2], matrices[2]], [0.5, 0.5, 0.0]), 0.5 * two)
    torch.testing.assert_close(wudi([torch.zeros(6, 5), matrices[0]], 1.0), matrices[0])
    assert torch.equal(
        least_interference([torch.zeros(2, 2).double()], 0.0), torch.zeros(2, 2).double()
    )
