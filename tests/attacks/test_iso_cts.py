"""Iso-CTS by hand, where it meets Iso-C, and against its formula written out in numpy."""

import numpy as np
import pytest
import torch

from trap2.attacks.attack import merge
from trap2.errors import UserError


def iso_cts(matrices, coefficients, common):
    updates = [{"w": m} for m in matrices]
    return dict(merge("iso_cts", updates, coefficients, common=common))["w"]


def iso_c(matrices, coefficients):
    return dict(merge("iso_c", [{"w": m} for m in matrices], coefficients))["w"]


def test_by_hand():
    # The sum diag(6, 3, 1.5) has rank 3; a third stays common: q = round((3 - 1) / 2) = 1, k = 1.
    # Common: 6 e1 e1'. Left over diag(0, 2, 1) and diag(0, 1, 0.5): 2 e2 e2' and 1 e2 e2'.
    # polar([e1 e2 e2]) = [e1 e2/sqrt(2) e2/sqrt(2)] on both sides, so U^ V^' = diag(1, 1, 0);
    # the mean of 6, 2, 1 is 3.
    one = torch.diag(torch.tensor([4.0, 2.0, 1.0]))
    merged = iso_cts([one, one / 2], 1.0, 1 / 3)
    expected = torch.diag(torch.tensor([3.0, 3.0, 0.0]))
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)


def test_it_is_iso_c_where_all_is_common_and_for_one_model():
    matrices = list(torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(iso_cts(matrices, 0.7, 1.0), iso_c(matrices, 0.7))
    one = matrices[:1]
    torch.testing.assert_close(iso_cts(one, 1.0, 0.4), iso_c(one, 1.0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("common", [0.0, 0.4, 0.8])
def test_equals_the_formula_in_numpy(common):
    matrices = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
    weights = [0.7, -0.4]
    scaled = [w * m for w, m in zip(weights, matrices.double().numpy(), strict=True)]
    u, s, vh = np.linalg.svd(sum(scaled), full_matrices=False)
    each = min(round((5 - int(common * 5)) / 2), 2)
    k = 5 - 2 * each
    left, values, right = [u[:, :k]], [s[:k]], [vh[:k]]
    for matrix in scaled:
        ut, st, vt = np.linalg.svd(matrix - u[:, :k] @ u[:, :k].T @ matrix, full_matrices=False)
        left.append(ut[:, :each])
        values.append(st[:each])
        right.append(vt[:each])
    pu, _, qu = np.linalg.svd(np.concatenate(left, 1), full_matrices=False)
    pv, _, qv = np.linalg.svd(np.concatenate(right, 0), full_matrices=False)
    expected = np.concatenate(values).mean() * pu @ qu @ pv @ qv
    ours = iso_cts(list(matrices), weights, common)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


def test_what_is_only_rounding_of_a_model_is_no_direction_of_its_own():
    # q = 2, k = 1. The second model is the common direction, so its rest is rounding, and the
    # merge has that direction and two of the first model.
    one = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    common = torch.linalg.svd(one)
    two = 1e3 * common.U[:, :1] @ common.Vh[:1]
    merged = iso_cts([one, two], 1.0, 0.5)
    assert int(torch.linalg.matrix_rank(merged, rtol=1e-3)) == 3


@pytest.mark.parametrize("common", [-0.1, 1.5])
def test_common_out_of_range(common):
    message = f"common={common} is no share of the singular directions; use 0 .* such as 0.8"
    with pytest.raises(UserError, match=message):
        iso_cts([torch.ones(2, 2)], 1.0, common)
