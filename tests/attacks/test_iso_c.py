"""Iso-C by hand and against its formula written out in numpy."""

import numpy as np
import torch

from trap2.attacks.attack import merge


def iso_c(matrices, coefficients):
    return dict(merge("iso_c", [{"w": m} for m in matrices], coefficients))["w"]


def test_by_hand():
    # [0 2; -1 0] + 0.5 * [0 2; 0 0] = [0 3; -1 0], singular values 3 and 1, mean 2
    one, two = torch.tensor([[[0.0, 2.0], [-1.0, 0.0]], [[0.0, 2.0], [0.0, 0.0]]])
    expected = torch.tensor([[0.0, 2.0], [-2.0, 0.0]])
    torch.testing.assert_close(iso_c([one, two], [1.0, 0.5]), expected)


def test_directions_without_a_singular_value_are_not_made_up():
    # Rank 1: the mean is over one value, and the second direction stays zero.
    one = torch.tensor([[4.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(iso_c([one], 1.0), one)


def test_one_model_alone_is_flattened():
    one = torch.diag(torch.tensor([3.0, 1.0]))
    torch.testing.assert_close(iso_c([one], 1.0), 2 * torch.eye(2))


def test_equals_the_formula_in_numpy():
    matrices = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))
    weights = np.array([0.7, -0.4, 1.0])
    total = np.tensordot(weights, matrices.double().numpy(), 1)
    u, s, vh = np.linalg.svd(total, full_matrices=False)
    ours = iso_c(list(matrices), list(weights))
    np.testing.assert_allclose(ours, s.mean() * u @ vh, rtol=0, atol=1e-5)
