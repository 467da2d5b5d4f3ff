"""TIES in shared bases, of one side (KnOTS) and of both (core space), by hand and in numpy."""

import numpy as np
import pytest
import torch

from trap2.attacks.attack import merge
from trap2.errors import UserError

SPACES = ["ties_knots", "ties_core"]


def merged(space, updates, coefficients, density=1.0):
    return dict(merge(space, updates, coefficients, density=density))


def one_matrix(space, matrices, coefficients, density=1.0):
    return merged(space, [{"w": m} for m in matrices], coefficients, density)["w"]


def test_knots_by_hand():
    # Both have the left direction u = (1, 1) / sqrt(2) alone. Turned, they are the rows
    # u' dW_1 = sqrt(2) (3, 1) and u' dW_2 = sqrt(2) (1, -2); TIES: sqrt(2) (2, -2)
    # back to two rows (2, -2).
    one, two = torch.tensor([[[3.0, 1.0], [3.0, 1.0]], [[1.0, -2.0], [1.0, -2.0]]])
    expected = torch.tensor([[2.0, -2.0], [2.0, -2.0]])
    torch.testing.assert_close(one_matrix("ties_knots", [one, two], 1.0), expected)
    torch.testing.assert_close(one_matrix("ties_knots", [one, two], 0.5), expected / 2)


def test_core_by_hand():
    # 6 u u' and -2 u u' with u = (1, 1) / sqrt(2): cores (6) and (-2), of which 6 is elected.
    one, two = torch.full((2, 2), 3.0), torch.full((2, 2), -1.0)
    torch.testing.assert_close(one_matrix("ties_core", [one, two], 1.0), one)
    # Of 6 and 2 it is the mean 4, as of -6 and -2 with coefficients below zero.
    mean = torch.full((2, 2), 2.0)
    torch.testing.assert_close(one_matrix("ties_core", [one, -two], 1.0), mean)
    torch.testing.assert_close(one_matrix("ties_core", [one, two], [-1.0, 1.0]), -mean)


@pytest.mark.parametrize("space", SPACES)
def test_models_that_do_not_meet_are_added_up(space):
    # Nobody else has a vote on what one model changes, not even by rounding.
    left = torch.linalg.qr(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))[0]
    one, two = 3 * left[:, :1] @ left[:, 2:3].T, 2 * left[:, 1:2] @ left[:, 3:].T
    expected = 0.5 * one + 0.25 * two
    torch.testing.assert_close(one_matrix(space, [one, two], [0.5, 0.25]), expected)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_equals_ties_of_what_numpy_turned(space, density):
    generator = torch.Generator().manual_seed(0)
    lefts = torch.randn(3, 8, 2, generator=generator)
    matrices = list(lefts @ torch.randn(3, 2, 7, generator=generator))
    weights = [1.0, 0.5, 0.8]
    arrays = [m.double().numpy() for m in matrices]
    u, s, _ = np.linalg.svd(np.concatenate(arrays, 1), full_matrices=False)
    left = torch.tensor(u[:, s > 1e-4 * s[0]]).float()
    _, s, vh = np.linalg.svd(np.concatenate(arrays, 0), full_matrices=False)
    right = torch.tensor(vh[s > 1e-4 * s[0]].T).float() if space == "ties_core" else torch.eye(7)
    turned = [{"w": left.T @ m @ right} for m in matrices]
    expected = left @ merged("ties", turned, weights, density)["w"] @ right.T
    ours = one_matrix(space, matrices, weights, density)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("space", SPACES)
def test_trimming_is_global_and_other_tensors_take_part(space):
    update = {"w": torch.tensor([[5.0, 0.0], [0.0, 1.0]]), "b": torch.tensor([4.0, 1e-9])}
    assert torch.equal(merged(space, [update], 1.0)["b"], update["b"])
    found = merged(space, [update], 1.0, 0.25)
    # Six entries (w is full in its own basis), two are kept: 5 and 4.
    torch.testing.assert_close(found["w"], torch.tensor([[5.0, 0.0], [0.0, 0.0]]))
    assert torch.equal(found["b"], torch.tensor([4.0, 0.0]))


@pytest.mark.parametrize("space", SPACES)
def test_coefficient_zero_drops_the_model_and_tensors_of_its_own_stay_at_the_base(space):
    generator = torch.Generator().manual_seed(0)
    one, two, three = torch.randn(3, 4, 5, generator=generator)
    updates = [{"w": one}, {"w": two, "v": three}, {"w": three}]
    found = merged(space, updates, [1.0, 0.0, 0.4])
    assert torch.equal(found["w"], one_matrix(space, [one, three], [1.0, 0.4]))
    assert torch.equal(found["v"], torch.zeros(4, 5))
    assert all(not value.any() for value in merged(space, updates, 0.0).values())


@pytest.mark.parametrize("space", SPACES)
def test_one_model_zero_updates_and_a_common_factor(space):
    one, two = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(one_matrix(space, [one], 1.0), one, rtol=0, atol=2e-5)
    for density in (0.5, 1.0):
        assert torch.equal(one_matrix(space, [one * 0, two * 0], 1.0, density), one * 0)
    once = one_matrix(space, [one, two], 1.0, 0.5)
    torch.testing.assert_close(one_matrix(space, [one, two], 0.3, 0.5), 0.3 * once)


@pytest.mark.parametrize("space", SPACES)
def test_density_out_of_range(space):
    with pytest.raises(UserError, match=r"density=0.0 keeps no share .* such as 0.2"):
        one_matrix(space, [torch.ones(2, 2)], 1.0, 0.0)
