"""Consensus by hand, and its symmetries."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trap2.attacks.attack import merge

ONE = torch.tensor([[4.0, 1.0], [2.0, -3.0]])
TWO = torch.tensor([[1.0, 2.0], [2.0, 4.0]])


def consensus(matrices, coefficients, strictness=0.5, votes=2):
    updates = [{"w": m} for m in matrices]
    return dict(merge("consensus", updates, coefficients, strictness=strictness, votes=votes))["w"]


def test_by_hand():
    # The sum is [5 3; 4 1]. Of two models, one wants an entry whose size is above half the other's:
    # the first 4 > .5 and 1 > 1 (no), 2 > 1, 3 > 2; the second 1 > 2 (no), 2 > .5, 2 > 1, 4 > 1.5.
    both = torch.tensor([[0.0, 0.0], [4.0, 1.0]])
    assert torch.equal(consensus([ONE, TWO], 1.0), both)
    assert torch.equal(consensus([ONE, TWO], 1.0, votes=1), ONE + TWO)
    # With coefficients 2 and 1 the first counts double: [9 4; 6 -2]; 8 > .5, 2 > 1, 4 > 1, 6 > 2;
    # the second 1 > 4 (no), 2 > 1, 2 > 2 (no), 4 > 3.
    weighted = torch.tensor([[0.0, 4.0], [0.0, -2.0]])
    assert torch.equal(consensus([ONE, TWO], [2.0, 1.0]), weighted)


def test_entries_nobody_wants_are_noise_of_the_sum():
    thirds = [torch.tensor([1.0, 5.0]), torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0])]
    assert torch.equal(consensus(thirds, 1.0, 0.6, votes=1), torch.tensor([0.0, 5.0]))


def test_one_model_is_that_model_and_coefficient_0_drops_one():
    assert torch.equal(consensus([ONE], 0.5), 0.5 * ONE)
    assert torch.equal(consensus([ONE, TWO], [0.5, 0.0]), 0.5 * ONE)
    assert torch.equal(consensus([ONE, TWO], 0.0), torch.zeros(2, 2))


@given(st.integers(0, 99), st.floats(0.125, 3, width=32))
def test_equal_coefficients_are_a_common_factor_and_order_does_not_matter(seed, c):
    matrices = list(torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(seed)))
    whole = consensus(matrices, 1.0)
    torch.testing.assert_close(consensus(matrices, c), c * whole)
    torch.testing.assert_close(consensus(matrices[::-1], 1.0), whole)


@pytest.mark.parametrize("strictness", [0.3, 0.9])
def test_equals_the_formula_entry_by_entry(strictness):
    matrices = list(torch.randn(4, 5, generator=torch.Generator().manual_seed(1)))
    merged = consensus(matrices, 0.7, strictness)
    for place in range(5):
        entries = [float(m[place]) for m in matrices]
        total = sum(entries)
        wanting = sum(abs(e) > strictness * abs(total - e) for e in entries)
        assert float(merged[place]) == pytest.approx(0.7 * total if wanting >= 2 else 0.0, abs=1e-6)
