"""NuSLERP by hand, against mergekit, and at its ends."""

import math

import pytest
import torch

from trap2.attacks.attack import load_attacks, merge
from trap2.errors import UserError


def nuslerp(updates, t, scale=1.0):
    return dict(merge("nuslerp", [{"w": u} for u in updates], t, scale=scale))["w"]


def test_by_hand_at_right_angles():
    one, two = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 4.0]])
    half = math.sqrt(0.5)
    torch.testing.assert_close(
        nuslerp([one, two], 0.5), torch.tensor([[2 * half, 0.0], [0.0, 4 * half]])
    )
    third = torch.tensor([[2 * math.cos(math.pi / 6), 0.0], [0.0, 4 * math.sin(math.pi / 6)]])
    torch.testing.assert_close(nuslerp([one, two], 1 / 3), third)
    torch.testing.assert_close(nuslerp([one, two], 1 / 3, scale=1.5), 1.5 * third)


def test_at_its_ends_it_is_one_of_the_two():
    one, two = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(nuslerp([one, two], 0.0), one)
    torch.testing.assert_close(nuslerp([one, two], 1.0), two)


@pytest.mark.parametrize("t", [0.2, 0.5, 0.9])
def test_equals_mergekit(t):
    mergekit = pytest.importorskip("mergekit.merge_methods.api")
    base, one, two = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(1))
    theirs = mergekit.merge_tensors(
        [base, base + one, base + two],
        "nuslerp",
        base_index=0,
        parameters={"weight": {1: 1 - t, 2: t}},
    )
    torch.testing.assert_close(base + nuslerp([one, two], t), theirs, rtol=0, atol=1e-5)


def test_coefficients_must_add_up_to_one():
    with pytest.raises(UserError, match=r"nuslerp got the coefficients \(1.0, 1.0\), which do not"):
        list(merge("nuslerp", [{"w": torch.ones(2)}] * 2, [1.0, 1.0]))
    assert load_attacks().get("nuslerp").spread(0.25, 2) == (0.75, 0.25)
