"""Changes of basis: against generic minimisers, by hand, and the same wherever a release hides."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import orthogonal_procrustes
from scipy.optimize import minimize

from trap2.attacks.basis import KINDS, change_of_basis, fitted

H = 4


def parts(seed, noise=0.1, blocks=2):
    """X, Y of a release near a base, and X0, Y0."""
    draw = torch.Generator().manual_seed(seed)
    X0, Y0, *near = (
        torch.randn(blocks, H, n, generator=draw, dtype=torch.float64) for n in (12, 9, 12, 9)
    )
    return X0 + noise * near[0], Y0 + noise * near[1], X0, Y0


def member(kind, seed, blocks=2):
    """Some M of a kind, by block."""
    draw = torch.Generator().manual_seed(seed)

    def numbers(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    if kind == "scale":
        return torch.diag_embed(3 ** numbers(blocks, H) * numbers(blocks, H).sign())
    if kind == "rotation":
        return torch.linalg.qr(numbers(blocks, H, H)).Q
    if kind == "rotary":
        a, b = (torch.diag_embed(numbers(blocks, H // 2)) for _ in range(2))
        return torch.cat([torch.cat([a, -b], 2), torch.cat([b, a], 2)], 1)
    return torch.linalg.qr(numbers(blocks, H, H)).Q @ torch.diag_embed(3 ** numbers(blocks, H))


def dual(M):
    return torch.linalg.inv(M).mT


def distance(M, X, Y, X0, Y0):
    return float((M @ X - X0).square().sum() + (dual(M) @ Y - Y0).square().sum())


PATTERNS = {
    "scale": lambda p: torch.diag(p[:H]),
    "rotary": lambda p: torch.cat(
        [
            torch.cat([torch.diag(p[:2]), -torch.diag(p[2:4])], 1),
            torch.cat([torch.diag(p[2:4]), torch.diag(p[:2])], 1),
        ],
        0,
    ),
    "invertible": lambda p: p.reshape(H, H),
}


@pytest.mark.parametrize("kind", PATTERNS)
@pytest.mark.parametrize("noise", [0.1, 1.0])
def test_no_generic_minimiser_finds_a_nearer_one(kind, noise):
    given = parts(0, noise, blocks=1)

    def loss(values):
        return distance(PATTERNS[kind](torch.from_numpy(values))[None], *given)

    start = {"scale": np.ones(H), "rotary": np.r_[np.ones(2), np.zeros(2)]}
    found = minimize(
        loss, start.get(kind, np.eye(H).ravel()), method="BFGS", options={"gtol": 1e-8}
    )
    M = KINDS[kind](*given)
    assert distance(M, *given) <= found.fun * (1 + 1e-6)
    torch.testing.assert_close(
        M, PATTERNS[kind](torch.from_numpy(found.x))[None], atol=2e-3, rtol=0
    )


def test_a_rotation_is_the_procrustes_solution_of_both_parts():
    X, Y, X0, Y0 = parts(1, noise=0.5)
    M = KINDS["rotation"](X, Y, X0, Y0)
    for block in range(2):
        stacked = [
            torch.cat(pair, 1).T.numpy() for pair in ((X[block], Y[block]), (X0[block], Y0[block]))
        ]
        R, _ = orthogonal_procrustes(*stacked)
        np.testing.assert_allclose(M[block].numpy(), R.T, atol=1e-12)


def test_a_scale_by_hand():
    # x = x0 / 4 and y = 4 y0 in the first row, turned around in the second
    X0, Y0 = torch.tensor([[[2.0, 4.0], [1.0, 3.0]]]), torch.tensor([[[5.0], [7.0]]])
    a = torch.tensor([[4.0, -0.5]])
    X, Y = X0 / a[..., None], Y0 * a[..., None]
    M = KINDS["scale"](*(t.double() for t in (X, Y, X0, Y0)))
    torch.testing.assert_close(M, torch.diag_embed(a).double())


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 10**6))
def test_the_nearest_release_is_the_same_wherever_it_hides(kind, seed):
    X, Y, X0, Y0 = parts(seed)
    g = member(kind, seed + 1)
    M, hidden = KINDS[kind](X, Y, X0, Y0), KINDS[kind](g @ X, dual(g) @ Y, X0, Y0)
    torch.testing.assert_close(hidden @ g @ X, M @ X, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dual(hidden) @ dual(g) @ Y, dual(M) @ Y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["scale", "rotation", "invertible"])
def test_the_smallest_kind_that_comes_near_is_taken(kind):
    X, Y, X0, Y0 = parts(2, noise=0.01)
    free = ("scale", "rotation", "invertible")
    assert change_of_basis(free, X, Y, X0, Y0) is None
    g = member(kind, 3)
    found = change_of_basis(free, g @ X, dual(g) @ Y, X0, Y0)
    assert found is not None
    M, S = found
    torch.testing.assert_close(M, KINDS[kind](g @ X, dual(g) @ Y, X0, Y0))
    torch.testing.assert_close(S @ M.mT, torch.eye(H).double().expand(2, H, H))
    torch.testing.assert_close((M @ g @ X).mT @ (S @ dual(g) @ Y), X.mT @ Y)


def test_where_nothing_was_trained_rounding_is_no_reason_for_a_larger_kind():
    X, Y, X0, Y0 = parts(4, noise=0.0)
    g = member("scale", 5)
    X, Y = ((t.float().double()) for t in (g @ X, dual(g) @ Y))
    found = change_of_basis(("scale", "rotation", "invertible"), X, Y, X0, Y0)
    assert found is not None
    torch.testing.assert_close(found[0], torch.diag_embed(found[0].diagonal(dim1=1, dim2=2)))


def test_what_commutes_with_positions_commutes():
    X, Y, X0, Y0 = parts(6, noise=0.5)
    M = KINDS["rotary"](X, Y, X0, Y0)
    c, s = (torch.diag(wave(torch.tensor([0.3, 1.1])).double()) for wave in (torch.cos, torch.sin))
    turn = torch.cat([torch.cat([c, -s], 1), torch.cat([s, c], 1)], 0)
    torch.testing.assert_close(M @ turn, turn @ M)


def test_parts_without_full_rank_do_no_harm():
    X, Y, X0, Y0 = parts(7)
    X[0] = 0.0
    Y[1, 0] = 0.0
    for kind in KINDS:
        M = KINDS[kind](X, Y, X0, Y0)
        assert bool(torch.isfinite(M).all())
        assert bool(torch.isfinite(dual(M)).all())


def test_the_independent_fit_is_least_squares():
    X, _, X0, _ = parts(8, noise=1.0)
    found = fitted(1e-12, X, X0)
    for block in range(2):
        oracle = np.linalg.lstsq(X[block].T.numpy(), X0[block].T.numpy(), rcond=None)[0].T
        np.testing.assert_allclose(found[block].numpy(), oracle, atol=1e-8)
