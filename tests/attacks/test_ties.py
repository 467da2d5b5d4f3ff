"""TIES by hand, against mergekit where the definitions coincide, and its symmetries."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trap2.attacks.attack import merge
from trap2.errors import UserError

QUICK = settings(deadline=None, max_examples=30)

ONE = {"w": torch.tensor([[4.0, -1.0], [3.0, 2.0]])}
TWO = {"w": torch.tensor([[-2.0, -5.0], [6.0, 1.0]])}


def ties(updates, coefficients, density=1.0):
    return dict(merge("ties", updates, coefficients, density=density))


def test_by_hand():
    # density 0.5 keeps the two largest of four: T1 = [4 0; 3 0], T2 = [0 -5; 6 0]
    # sum = [4 -5; 9 0]: signs + - + 0; agreeing: {1} {2} {1,2} {}
    # mean = [4 -5; 4.5 0], times c = 2
    merged = ties([ONE, TWO], 2.0, density=0.5)["w"]
    assert torch.equal(merged, torch.tensor([[8.0, -10.0], [9.0, 0.0]]))


def test_by_hand_with_one_coefficient_per_model():
    # density 1, c = (1, 3): parts [4 -1; 3 2], [-6 -15; 18 3]; sum [-2 -16; 21 5]
    # agreeing {2} {1,2} {1,2} {1,2}; mean [-6 -8; 10.5 2.5]
    merged = ties([ONE, TWO], [1.0, 3.0])["w"]
    expected = torch.tensor([[-6.0, -8.0], [10.5, 2.5]])
    torch.testing.assert_close(merged, expected, rtol=1e-6, atol=0)


def test_the_threshold_is_global_over_the_update():
    # The two largest of the six entries are both in `b`, so all of `a` is trimmed away.
    update = {"a": torch.tensor([1.0, -2.0, 3.0]), "b": torch.tensor([9.0, -8.0, 0.5])}
    merged = ties([update], 1.0, density=1 / 3)
    assert torch.equal(merged["a"], torch.zeros(3))
    assert torch.equal(merged["b"], torch.tensor([9.0, -8.0, 0.0]))


def test_entries_that_tie_with_the_threshold_are_all_kept():
    update = {"w": torch.tensor([1.0, -1.0, 1.0, 0.5])}
    assert torch.equal(ties([update], 1.0, 0.25)["w"], torch.tensor([1.0, -1.0, 1.0, 0.0]))


def test_a_tensor_only_one_model_has():
    merged = ties([{"a": torch.ones(2)}, {"b": torch.ones(1)}], 0.5)
    assert list(merged) == ["a", "b"]
    assert torch.equal(merged["a"], torch.full((2,), 0.5))


def test_tensors_longer_than_a_piece():
    rows = torch.randn(2, 2**16 + 5, generator=torch.Generator().manual_seed(0))
    long = ties([{"w": row} for row in rows], 0.5)["w"]
    assert torch.equal(long[-9:], ties([{"w": row[-9:]} for row in rows], 0.5)["w"])


def test_an_exact_draw_elects_nobody():
    merged = ties([{"w": torch.tensor([2.0])}, {"w": torch.tensor([-2.0])}], 1.0)["w"]
    assert torch.equal(merged, torch.zeros(1))


def test_coefficient_zero_drops_the_model_altogether():
    alone = ties([ONE], 0.7)["w"]
    assert torch.equal(ties([ONE, TWO], [0.7, 0.0])["w"], alone)
    assert torch.equal(ties([ONE, TWO], 0.0)["w"], torch.zeros(2, 2))


@QUICK
@given(st.lists(st.lists(st.integers(-8, 8), min_size=4, max_size=4), min_size=1, max_size=4))
def test_permutation_of_models_and_sign(rows):
    updates = [{"w": torch.tensor(row) / 4} for row in rows]
    merged = ties(updates, 1.0, 0.5)["w"]
    assert torch.equal(ties(updates[::-1], 1.0, 0.5)["w"], merged)
    negated = [{"w": -update["w"]} for update in updates]
    assert torch.equal(ties(negated, 1.0, 0.5)["w"], -merged)


@QUICK
@given(st.floats(-3, 3, width=32), st.integers(0, 99))
def test_equal_coefficients_are_an_exact_common_factor(c, seed):
    rows = torch.randn(3, 7, generator=torch.Generator().manual_seed(seed))
    updates = [{"w": row} for row in rows]
    factor = torch.tensor(c, dtype=torch.float32)
    expected = ties(updates, 1.0, 0.4)["w"] * factor
    assert torch.equal(ties(updates, c, 0.4)["w"] + 0, expected + 0)


@QUICK
@given(st.sampled_from([0.25, 0.5, 2.0, 8.0]), st.integers(0, 99))
def test_scaling_the_updates_scales_the_merge(factor, seed):
    rows = torch.randn(3, 7, generator=torch.Generator().manual_seed(seed))
    small = ties([{"w": row} for row in rows], [1.0, 0.5, -0.2], 0.6)["w"]
    large = ties([{"w": factor * row} for row in rows], [1.0, 0.5, -0.2], 0.6)["w"]
    assert torch.equal(factor * small, large)


@pytest.mark.parametrize("density", [0.5, 1.0])
def test_equals_mergekit_on_one_tensor(density):
    # mergekit trims per tensor, which is global where there is one tensor; with weight 1 and its
    # default normalize=True it divides by the number of agreeing models; lambda is c.
    mergekit = pytest.importorskip("mergekit.merge_methods.api")
    generator = torch.Generator().manual_seed(0)
    base, one, two, three = torch.randn(4, 5, 4, generator=generator)
    theirs = mergekit.merge_tensors(
        [base, base + one, base + two, base + three],
        "ties",
        base_index=0,
        parameters={"weight": 1.0, "density": density, "lambda": 0.6},
    )
    ours = ties([{"w": one}, {"w": two}, {"w": three}], 0.6, density)["w"]
    torch.testing.assert_close(base + ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5])
def test_density_out_of_range(density):
    with pytest.raises(UserError, match=f"density={density} keeps no share .* such as 0.2"):
        ties([ONE], 1.0, density)
