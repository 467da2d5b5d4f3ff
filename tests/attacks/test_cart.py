"""CART by hand, at its ends, and against its formula written out in numpy."""

import math

import numpy as np
import pytest
import torch

from trap2.attacks.attack import merge
from trap2.errors import UserError


def cart(matrices, coefficients, rank_share=0.5, weight=1.0):
    updates = [{"w": m} for m in matrices]
    parameters = {"rank_share": rank_share, "weight": weight}
    return dict(merge("cart", updates, coefficients, **parameters))["w"]


def diagonal(*entries):
    return torch.diag(torch.tensor(entries))


def test_by_hand():
    # Mean of diag(6, 0), diag(0, 3), diag(3, 3): diag(3, 2). Apart diag(3, -2), diag(-3, 1),
    # diag(0, 1); of rank 1: diag(3, 0), diag(-3, 0), diag(0, 1); their sum diag(0, 1).
    matrices = [diagonal(6.0, 0.0), diagonal(0.0, 3.0), diagonal(3.0, 3.0)]
    torch.testing.assert_close(cart(matrices, 1.0), diagonal(3.0, 3.0))
    torch.testing.assert_close(cart(matrices, 1.0, weight=0.5), diagonal(3.0, 2.5))
    halves = [matrices[0] / 2, *matrices[1:]]
    torch.testing.assert_close(cart(halves, [2.0, 1.0, 1.0]), diagonal(3.0, 3.0))


def test_it_is_the_mean_where_nothing_is_cut_and_for_two_models():
    matrices = list(torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0)))
    whole = cart(matrices, [1.0, 0.5, 0.2], 1.0)
    mean = (matrices[0] + 0.5 * matrices[1] + 0.2 * matrices[2]) / 3
    torch.testing.assert_close(whole, mean, rtol=0, atol=1e-6)
    two = cart(matrices[:2], 1.0, 0.2)
    torch.testing.assert_close(two, (matrices[0] + matrices[1]) / 2, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rank", [2, 12])
@pytest.mark.parametrize("rank_share", [0.1, 0.34, 0.5])
def test_equals_the_formula_in_numpy(rank, rank_share):
    generator = torch.Generator().manual_seed(rank)
    lefts = torch.randn(3, 16, rank, generator=generator)
    matrices = lefts @ torch.randn(3, rank, 12, generator=generator)
    weights = [0.7, -0.4, 1.0]
    scaled = [w * m for w, m in zip(weights, matrices.double().numpy(), strict=True)]
    mean = sum(scaled) / 3
    expected = mean.copy()
    # Three updates of rank 2 span 6 directions, of rank 12 all 12.
    k = math.ceil(rank_share * min(12, 3 * rank))
    for matrix in scaled:
        u, s, vh = np.linalg.svd(matrix - mean, full_matrices=False)
        expected += 0.8 * u[:, :k] * s[:k] @ vh[:k]
    ours = cart(list(matrices), weights, rank_share, 0.8)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("rank_share", [0.0, -0.1, 1.5])
def test_rank_share_out_of_range(rank_share):
    message = f"rank_share={rank_share} keeps no part of the rank; use 0 .* such as 0.08"
    with pytest.raises(UserError, match=message):
        cart([torch.ones(2, 2)], 1.0, rank_share)
