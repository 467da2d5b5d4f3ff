"""EMR and TALL masks by hand, and what is known of them in general."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trap2.attacks.attack import ROUTING, load_attacks, merge

ONE = torch.tensor([[4.0, 1.0], [2.0, -3.0]])
TWO = torch.tensor([[1.0, -2.0], [2.0, 4.0]])


def routed(name, matrices, coefficients=1.0, **params):
    return dict(merge(name, [{"w": m} for m in matrices], coefficients, **params))["w"]


def test_emr_by_hand():
    # The sum is [5 -1; 4 1], so + - + +; the largest of that sign: [4 -2; 2 4].
    # The first model has that sign in two entries, 4 and 2: scaled by (4+1+2+3) / (4+2).
    first = torch.tensor([[4.0, 0.0], [2.0, 0.0]]) * 10 / 6
    torch.testing.assert_close(routed("emr", [ONE, TWO]), first)
    # The second has it everywhere: (1+2+2+4) / (4+2+2+4).
    second = torch.tensor([[4.0, -2.0], [2.0, 4.0]]) * 9 / 12
    torch.testing.assert_close(routed("emr", [TWO, ONE]), second)


def test_emr_rescales_over_all_tensors_of_a_model():
    updates = [{"a": ONE, "b": torch.tensor([1.0])}, {"a": TWO, "b": torch.tensor([3.0])}]
    merged = dict(merge("emr", updates, 1.0))
    factor = (10 + 1) / (6 + 3)
    torch.testing.assert_close(merged["a"], factor * torch.tensor([[4.0, 0.0], [2.0, 0.0]]))
    torch.testing.assert_close(merged["b"], factor * torch.tensor([3.0]))


def test_tall_masks_by_hand():
    # The sum is [5 -1; 4 1]. The first wants 4 > .5 * 1, 1 > .5 * 2 (no), 2 > 1, 3 > 2.
    found = routed("tall_masks", [ONE, TWO], strictness=0.5)
    assert torch.equal(found, torch.tensor([[5.0, 0.0], [4.0, 1.0]]))
    # The second wants 1 > .5 * 4 (no), 2 > .5, 2 > 1, 4 > 1.5.
    found = routed("tall_masks", [TWO, ONE], strictness=0.5)
    assert torch.equal(found, torch.tensor([[0.0, -1.0], [4.0, 1.0]]))


@given(st.integers(0, 99), st.sampled_from(["emr", "tall_masks"]))
def test_the_order_of_the_others_does_not_matter(seed, name):
    own, *others = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(seed))
    params = {"strictness": 0.4} if name == "tall_masks" else {}
    torch.testing.assert_close(
        routed(name, [own, *others], **params), routed(name, [own, *others[::-1]], **params)
    )


@pytest.mark.parametrize("name", ["emr", "tall_masks"])
def test_updates_that_do_not_meet_come_back_whole(name):
    updates = [{"a": ONE, "b": torch.zeros(2)}, {"a": torch.zeros(2, 2), "b": torch.ones(2)}]
    params = {"strictness": 0.4} if name == "tall_masks" else {}
    merged = dict(merge(name, updates, 1.0, **params))
    torch.testing.assert_close(merged, {"a": ONE, "b": torch.zeros(2)})


@pytest.mark.parametrize("name", ["emr", "tall_masks"])
def test_a_zero_update_stays_zero_and_no_tier_counts_it(name):
    params = {"strictness": 0.4} if name == "tall_masks" else {}
    assert not routed(name, [torch.zeros(2, 2), ONE], **params).any()
    assert load_attacks().get(name).tiers == (ROUTING,)
