"""TIES with a sum by hand, beside TIES itself, and against mergekit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trap2.attacks.attack import merge
from trap2.errors import UserError

QUICK = settings(deadline=None, max_examples=30)

ONE = {"w": torch.tensor([[4.0, -1.0], [3.0, 2.0]])}
TWO = {"w": torch.tensor([[-2.0, -5.0], [6.0, 1.0]])}


def ties_sum(updates, coefficients, density=1.0):
    return dict(merge("ties_sum", updates, coefficients, density=density))["w"]


def test_by_hand():
    # density 0.5 keeps the two largest of four: T1 = [4 0; 3 0], T2 = [0 -5; 6 0]
    # sum = [4 -5; 9 0]: signs + - + 0; agreeing: {1} {2} {1,2} {}; their sum, times c = 2
    merged = ties_sum([ONE, TWO], 2.0, 0.5)
    assert torch.equal(merged, torch.tensor([[8.0, -10.0], [18.0, 0.0]]))


def test_by_hand_with_one_coefficient_per_model():
    # density 1, c = (1, 3): parts [4 -1; 3 2], [-6 -15; 18 3]; agreeing {2} {1,2} {1,2} {1,2}
    merged = ties_sum([ONE, TWO], [1.0, 3.0])
    expected = torch.tensor([[-6.0, -16.0], [21.0, 5.0]])
    torch.testing.assert_close(merged, expected, rtol=1e-6, atol=0)


def test_models_that_all_agree_are_added_up():
    assert torch.equal(ties_sum([ONE, ONE, ONE], 1.0), 3 * ONE["w"])


def test_coefficient_zero_drops_the_model_altogether():
    assert torch.equal(ties_sum([ONE, TWO], [0.5, 0.0]), 0.5 * ONE["w"])
    assert torch.equal(ties_sum([ONE, TWO], 0.0), torch.zeros(2, 2))


@QUICK
@given(st.floats(-3, 3, width=32), st.integers(0, 99))
def test_equal_coefficients_are_an_exact_common_factor(c, seed):
    rows = torch.randn(3, 7, generator=torch.Generator().manual_seed(seed))
    updates = [{"w": row} for row in rows]
    expected = ties_sum(updates, 1.0, 0.4) * torch.tensor(c, dtype=torch.float32)
    assert torch.equal(ties_sum(updates, c, 0.4) + 0, expected + 0)


@pytest.mark.parametrize("density", [0.5, 1.0])
def test_equals_mergekit_on_one_tensor(density):
    mergekit = pytest.importorskip("mergekit.merge_methods.api")
    base, one, two, three = torch.randn(4, 5, 4, generator=torch.Generator().manual_seed(0))
    theirs = mergekit.merge_tensors(
        [base, base + one, base + two, base + three],
        "ties",
        base_index=0,
        parameters={
            "weight": {1: 0.5, 2: 0.7, 3: 0.9},
            "density": density,
            "normalize": False,
        },
    )
    ours = ties_sum([{"w": one}, {"w": two}, {"w": three}], [0.5, 0.7, 0.9], density)
    torch.testing.assert_close(base + ours, theirs, rtol=0, atol=1e-6)


def test_density_out_of_range():
    with pytest.raises(UserError, match=r"density=0.0 keeps no share .* such as 0.2"):
        ties_sum([ONE], 1.0, 0.0)
