"""Which block is which: against trying every assignment, and whatever the basis of the blocks."""

from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trap2.attacks.anatomy import Layer, Pair, Part
from trap2.attacks.matching import assigned, cosines, order


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(seed=st.integers(0, 10**6))
def test_an_assignment_is_the_best_of_all(seed):
    likeness = numbers(4, 4, seed=seed)
    best = max(permutations(range(4)), key=lambda p: float(likeness[list(p), range(4)].sum()))
    assert assigned(likeness).tolist() == list(best)


def test_cosines_by_hand():
    one = torch.tensor([[[3.0, 4.0]], [[0.0, 2.0]]])
    other = torch.tensor([[[1.0, 0.0]], [[0.0, 0.0]]])
    torch.testing.assert_close(cosines(one, other), torch.tensor([[0.6, 0.0], [0.0, 0.0]]))


def units(fixed):
    up, down = Part("up", "b", False, 5), Part("down", None, True, 5)
    return Layer((), (up, down), 5) if fixed else Layer((Pair(up, down, ("scale",)),), (), 5)


BASE = {"up": numbers(5, 3), "b": numbers(5, seed=1), "down": numbers(4, 5, seed=2)}


@pytest.mark.parametrize("fixed", [True, False])
def test_units_are_found_again(fixed):
    permutation = torch.tensor([3, 0, 4, 2, 1])
    a = torch.ones(5) if fixed else torch.tensor([0.1, -3.0, 1.0, 10.0, 0.5])
    hidden = {
        "up": (a[:, None] * BASE["up"])[permutation],
        "b": (a * BASE["b"])[permutation],
        "down": (BASE["down"] / a)[:, permutation],
    }
    found = order(units(fixed), hidden.__getitem__, BASE.__getitem__)
    assert permutation[found].tolist() == list(range(5))


def test_units_in_their_places_stay_there_though_others_would_do_as_well():
    twins = {"up": torch.ones(5, 3), "b": torch.ones(5), "down": torch.ones(4, 5)}
    for layer in (units(True), units(False)):
        assert order(layer, BASE.__getitem__, BASE.__getitem__) is None
        assert order(layer, twins.__getitem__, twins.__getitem__) is None


@pytest.mark.parametrize("size", [1, 2])
def test_heads_are_matched_in_any_basis_and_stay_with_their_keys(size):
    groups, h = 3, 2
    heads = groups * size
    q, o = numbers(heads * h, 12, seed=3), numbers(12, heads * h, seed=4)
    k, v = numbers(groups * h, 12, seed=5), numbers(groups * h, 12, seed=6)
    base = {"q": q, "k": k, "v": v, "o": o}
    layer = Layer(
        (
            Pair(Part("q", None, False, heads), Part("k", None, False, groups), ()),
            Pair(Part("v", None, False, groups), Part("o", None, True, heads), ()),
        ),
        (),
        groups,
    )
    M = numbers(groups, h, h, seed=7)
    split = {n: t.reshape(-1, h, 12) for n, t in (("q", q), ("k", k), ("v", v), ("o", o.T))}
    wide = M.repeat_interleave(size, 0)
    split |= {"q": wide @ split["q"], "k": torch.linalg.inv(M).mT @ split["k"]}
    split |= {"v": M @ split["v"], "o": torch.linalg.inv(wide).mT @ split["o"]}
    outer = torch.tensor([2, 0, 1])
    inner = torch.cat([g * size + torch.arange(size).flip(0) for g in outer])
    hidden = {n: split[n][inner if n in "qo" else outer].reshape(-1, 12) for n in split}
    hidden["o"] = hidden["o"].T
    found = order(layer, hidden.__getitem__, base.__getitem__)
    assert inner[found].tolist() == list(range(heads))
    assert order(layer, base.__getitem__, base.__getitem__) is None
