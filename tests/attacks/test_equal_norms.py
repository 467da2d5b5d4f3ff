"""Equal norms by hand, and that the length of an update no longer matters."""

import torch

from trap2.attacks.attack import merge


def equal_norms(updates, coefficients):
    return dict(merge("equal_norms", updates, coefficients))


def test_by_hand_over_the_whole_update():
    # Norms 5 (over both tensors) and 15, mean 10: the first is doubled, the second times 2/3.
    one = {"a": torch.tensor([[3.0, 0.0]]), "b": torch.tensor([4.0])}
    two = {"a": torch.tensor([[9.0, 12.0]])}
    merged = equal_norms([one, two], [1.0, 0.5])
    torch.testing.assert_close(merged["a"], torch.tensor([[6.0 + 3.0, 4.0]]))
    torch.testing.assert_close(merged["b"], torch.tensor([8.0]))


def test_a_model_with_coefficient_0_has_no_say_in_the_norm():
    one, two = {"a": torch.tensor([3.0, 4.0])}, {"a": torch.tensor([30.0, 40.0])}
    torch.testing.assert_close(equal_norms([one, two], [0.5, 0.0])["a"], 0.5 * one["a"])
    assert torch.equal(equal_norms([one, two], 0.0)["a"], torch.zeros(2))


def test_an_update_of_zeros_stays_one():
    one, two = {"a": torch.zeros(2)}, {"a": torch.tensor([3.0, 4.0])}
    assert torch.equal(equal_norms([one, two], 1.0)["a"], two["a"])


def test_the_direction_of_the_merge_does_not_depend_on_the_length_of_an_update():
    one, two = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    short = equal_norms([{"a": 0.01 * one}, {"a": two}], 1.0)["a"]
    long = equal_norms([{"a": one}, {"a": two}], 1.0)["a"]
    torch.testing.assert_close(short / short.norm(), long / long.norm())
