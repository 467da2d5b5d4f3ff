"""What the attacks that merge singular values share, and the laws that all of them keep."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trap2.attacks import spectrum as module
from trap2.attacks.attack import merge
from trap2.attacks.spectrum import RANK_TOLERANCE, Core, core, polar, spectrum, triplets
from trap2.attacks.vectors import TaskVector
from trap2.errors import UserError

QUICK = settings(deadline=None, max_examples=20)

ATTACKS = {
    "tsv": {},
    "iso_c": {},
    "iso_cts": {"common": 0.5},
    "cart": {"rank_share": 0.3, "weight": 0.7},
}
"""Each with parameters at which it does all it can."""

KEEPS_ONE = ["tsv", "cart"]
"""Those that give back a single model."""


def low_rank(rows, columns, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, rank, generator=generator)
    return left @ torch.randn(rank, columns, generator=generator)


def update(seed, rank=2):
    """A matrix of full rank, one of low rank, and a bias."""
    generator = torch.Generator().manual_seed(seed)
    full = torch.randn(6, 5, generator=generator)
    bias = torch.randn(4, generator=generator)
    return {"full": full, "low": low_rank(12, 9, rank, seed + 100), "bias": bias}


def merged(name, updates, coefficients):
    return dict(merge(name, updates, coefficients, **ATTACKS[name]))


def assert_close(ours, theirs, atol=2e-5):
    assert list(ours) == list(theirs)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("shape", "rank"),
    [((7, 5), 5), ((5, 7), 2), ((200, 180), 3), ((180, 200), 79), ((170, 170), 90)],
)
def test_triplets_are_those_of_numpy_up_to_the_rank(shape, rank):
    matrix = low_rank(*shape, rank, 0)
    found = triplets(matrix)
    assert found.S.dtype == torch.float64
    assert len(found.S) == rank
    expected = np.linalg.svd(matrix.double().numpy(), compute_uv=False)[:rank]
    np.testing.assert_allclose(found.S, expected, rtol=0, atol=1e-5 * expected[0])
    torch.testing.assert_close(found.matrix().float(), matrix, rtol=0, atol=1e-4)
    eye = torch.eye(rank, dtype=torch.float64)
    for vectors in (found.U, found.V):
        torch.testing.assert_close(vectors.T @ vectors, eye, rtol=0, atol=1e-9)
    assert torch.equal(found.top(2).S, found.S[:2])


def test_the_short_way_is_taken_only_where_it_is_exact(monkeypatch):
    taken = []
    short = module._range
    monkeypatch.setattr(module, "_range", lambda *a: taken.append(short(*a)) or taken[-1])
    for matrix in (low_rank(200, 200, 60, 0), low_rank(200, 200, 81, 0), low_rank(9, 9, 1, 0)):
        triplets(matrix)
    assert [basis is not None for basis in taken] == [True, False, False]


def test_triplets_move_no_random_stream():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    triplets(low_rank(200, 200, 3, 0))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_zero_has_no_triplets():
    assert len(triplets(torch.zeros(3, 2)).S) == 0
    assert torch.equal(polar(torch.zeros(3, 2)), torch.zeros(3, 2, dtype=torch.float64))


def test_rounding_is_measured_against_the_norm_given():
    rest = torch.full((1, 1), RANK_TOLERANCE / 2)
    assert len(triplets(rest).S) == 1
    assert len(triplets(rest, 1.0).S) == 0


def test_triplets_of_what_is_not_finite():
    message = "an update holds NaN or infinity and so has no singular values; give finite updates"
    with pytest.raises(UserError, match=message):
        triplets(torch.tensor([[1.0, float("nan")]]))


def test_polar_by_hand():
    # Two unit vectors at cos 0.6 are turned apart by the same angle, to (3, -1) and (1, 3).
    found = polar(torch.tensor([[1.0, 0.6], [0.0, 0.8]]))
    expected = torch.tensor([[3.0, 1.0], [-1.0, 3.0]], dtype=torch.float64) / 10**0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    # The same vector twice is shared between both, and no other direction is made up.
    twice = polar(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    half = torch.tensor([[0.5, 0.5], [0.0, 0.0]], dtype=torch.float64) * 2**0.5
    torch.testing.assert_close(twice, half)


def test_a_core_holds_the_updates_and_their_singular_values():
    members = [TaskVector.of({"w": low_rank(12, 9, rank, rank)}) for rank in (1, 2)]
    deltas = [member["w"] for member in members]
    small = core(members, "w", deltas)
    assert [part.shape for part in small.parts] == [(3, 3), (3, 3)]
    for part, delta in zip(small.parts, deltas, strict=True):
        torch.testing.assert_close(small.restore(part).float(), delta, rtol=0, atol=1e-5)
        torch.testing.assert_close(triplets(part).S, triplets(delta).S, rtol=1e-5, atol=0)
    assert core(members, "w", deltas) is small


def test_a_core_that_would_not_be_smaller_is_the_whole():
    members = [TaskVector.of({"w": low_rank(4, 9, 2, seed)}) for seed in (0, 1)]
    whole = core(members, "w", [member["w"] for member in members])
    assert whole.left is None
    assert torch.equal(whole.parts[0], members[0]["w"].double())
    assert torch.equal(Core(None, None, []).restore(whole.parts[1]), whole.parts[1])


def test_a_spectrum_is_worked_out_once_for_all_coefficients(monkeypatch):
    members = [TaskVector.of(update(seed)) for seed in (0, 1)]
    done = []
    whole = module.triplets
    monkeypatch.setattr(module, "triplets", lambda *a: done.append(a) or whole(*a))
    assert spectrum(members[0], "low") is spectrum(members[0], "low")
    merged("tsv", members, 1.0)
    once = len(done)
    merged("tsv", members, 0.5)
    merged("tsv", members, [1.0, 0.25])
    assert len(done) == once


@pytest.mark.parametrize("name", ATTACKS)
@QUICK
@given(st.floats(-3, 3, width=32), st.integers(0, 9))
def test_equal_coefficients_are_an_exact_common_factor(name, c, seed):
    updates = [update(seed), update(seed + 1)]
    once = merged(name, updates, 1.0)
    for tensor, value in merged(name, updates, c).items():
        assert torch.equal(value, c * once[tensor])


@pytest.mark.parametrize("name", ATTACKS)
def test_coefficients_scale_the_updates(name):
    updates = [update(seed) for seed in range(3)]
    weights = [1.0, 0.5, 1.5]
    scaled = [
        {key: c * value for key, value in u.items()} for c, u in zip(weights, updates, strict=True)
    ]
    assert_close(merged(name, updates, weights), merged(name, scaled, 1.0))


@pytest.mark.parametrize("name", ATTACKS)
def test_coefficient_zero_drops_the_model_altogether(name):
    updates = [update(seed) for seed in range(3)]
    rest = merged(name, [updates[0], updates[2]], [1.0, 0.4])
    assert_close(merged(name, updates, [1.0, 0.0, 0.4]), rest, atol=0)
    assert all(not value.any() for value in merged(name, updates, 0.0).values())
    only = merged(name, [{}, updates[0]], [1.0, 0.0])
    assert all(not value.any() for value in only.values())


@pytest.mark.parametrize("name", ATTACKS)
def test_the_order_of_the_models_does_not_matter(name):
    updates = [update(seed) for seed in range(3)]
    weights = [1.0, 0.5, 0.8]
    assert_close(merged(name, updates[::-1], weights[::-1]), merged(name, updates, weights))


@pytest.mark.parametrize("name", ATTACKS)
def test_rotating_the_updates_rotates_the_merge(name):
    left, right = (torch.linalg.qr(low_rank(n, n, n, n))[0] for n in (12, 9))
    updates = [{"w": low_rank(12, 9, 2, seed)} for seed in range(3)]
    turned = [{"w": left @ u["w"] @ right.T} for u in updates]
    expected = {"w": left @ merged(name, updates, 1.0)["w"] @ right.T}
    assert_close(merged(name, turned, 1.0), expected)


@pytest.mark.parametrize("name", ATTACKS)
def test_other_tensors_are_averaged(name):
    updates = [{"b": torch.tensor([1.0, 2.0])}, {"b": torch.tensor([3.0, 8.0])}]
    assert torch.equal(merged(name, updates, [1.0, 0.5])["b"], torch.tensor([1.25, 3.0]))


@pytest.mark.parametrize("name", ATTACKS)
def test_zero_updates_and_tensors_that_one_model_has(name):
    zero = {"w": torch.zeros(3, 2)}
    assert torch.equal(merged(name, [zero, zero], 1.0)["w"], torch.zeros(3, 2))
    found = merged(name, [{"a": torch.ones(2)}, update(0)], [1.0, 0.5])
    assert list(found) == ["a", "full", "low", "bias"]
    assert torch.equal(found["a"], torch.full((2,), 0.5))
    assert found["low"].abs().max() > 0.1


@pytest.mark.parametrize("name", KEEPS_ONE)
def test_one_model_alone_stays_as_it_is(name):
    for rank in (1, 9):
        alone = update(0, rank)
        assert_close(merged(name, [alone], 1.0), alone)
