"""TSV-M by hand and against its formula written out in numpy."""

import numpy as np
import pytest
import torch

from trap2.attacks.attack import merge


def tsv(matrices, coefficients):
    return dict(merge("tsv", [{"w": m} for m in matrices], coefficients))["w"]


def test_by_hand_directions_that_do_not_meet():
    # Half of two triplets is one each: 3 e1 e1' of the first and 5 e2 e2' of the second.
    one, two = torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([2.0, 5.0]))
    merged = tsv([one, two], [2.0, 1.0])
    torch.testing.assert_close(merged, torch.diag(torch.tensor([6.0, 5.0])))


def test_by_hand_directions_that_do():
    # 3 e1 e1' and 5 u u' with u = (3, 4) / 5; e1 and u are turned apart to a = (3, -1) / sqrt(10)
    # and b = (1, 3) / sqrt(10): 3 a a' + 5 b b' = 0.3 [9 -3; -3 1] + 0.5 [1 3; 3 9]
    one = torch.tensor([[3.0, 0.0], [0.0, 0.0]])
    two = torch.tensor([[1.8, 2.4], [2.4, 3.2]])
    merged = tsv([one, two], 1.0)
    expected = torch.tensor([[3.2, 0.6], [0.6, 4.8]])
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)


def test_two_equal_updates_are_that_update():
    one = torch.tensor([[3.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(tsv([one, one], 1.0), one)


@pytest.mark.parametrize("shape", [(8, 6), (6, 8), (7, 7)])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_equals_the_formula_in_numpy(shape, count):
    generator = torch.Generator().manual_seed(count)
    matrices = torch.randn(count, *shape, generator=generator)
    weights = [0.7, -0.4, 1.0][:count]
    kept = min(shape) // count
    left, values, right = [], [], []
    for matrix, weight in zip(matrices.double().numpy(), weights, strict=True):
        u, s, vh = np.linalg.svd(matrix, full_matrices=False)
        left.append(u[:, :kept])
        values.append(weight * s[:kept])
        right.append(vh[:kept])
    pu, _, qu = np.linalg.svd(np.concatenate(left, 1), full_matrices=False)
    pv, _, qv = np.linalg.svd(np.concatenate(right, 0), full_matrices=False)
    expected = pu @ qu @ np.diag(np.concatenate(values)) @ pv @ qv
    ours = tsv(list(matrices), weights)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


def test_more_models_than_rows_keep_one_direction_each():
    merged = tsv([torch.tensor([[float(i + 1), 0.0]]) for i in range(3)], 1.0)
    # All share e1 (left and right), so each has 1/sqrt(3) of it twice: (1 + 2 + 3) / 3.
    torch.testing.assert_close(merged, torch.tensor([[2.0, 0.0]]))
