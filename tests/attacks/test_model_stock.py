"""Model Stock by hand, at the ends of its angle, and against mergekit."""

import pytest
import torch

from trap2.attacks.attack import merge


def model_stock(updates, coefficients):
    return dict(merge("model_stock", [{"w": u} for u in updates], coefficients))["w"]


def test_by_hand():
    # cos between (5, 0) and (3, 4) is 0.6: t = 2 * 0.6 / 1.6 = 0.75, mean (4, 2)
    one, two = torch.tensor([[5.0, 0.0], [3.0, 4.0]])
    torch.testing.assert_close(model_stock([one, two], 1.0), torch.tensor([3.0, 1.5]))
    # Coefficients move the mean, (5.5, 4), but not the angle.
    torch.testing.assert_close(model_stock([one, two], [1.0, 2.0]), torch.tensor([4.125, 3.0]))


def test_by_hand_with_three_models():
    # Cosines 0.6, 0.8 and 0.96, mean a = 2.36 / 3: t = 2.36 / (1 + 2 a)
    updates = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]])
    t = 2.36 / (1 + 2 * 2.36 / 3)
    torch.testing.assert_close(model_stock(list(updates), 1.0), t * updates.mean(dim=0))


def test_equal_updates_stay_and_updates_at_a_right_angle_or_wider_vanish():
    one = torch.tensor([1.0, 2.0])
    torch.testing.assert_close(model_stock([one, one], 1.0), one)
    for other in (torch.tensor([-2.0, 1.0]), -one, torch.tensor([-1.0, -1.9])):
        assert torch.equal(model_stock([one, other], 1.0), torch.zeros(2))


def test_a_model_that_leaves_a_tensor_alone_is_left_out_of_it():
    one, two = torch.tensor([[5.0, 0.0], [3.0, 4.0]])
    expected = model_stock([one, two], [1.0, 0.5])
    zero = torch.zeros(2)
    torch.testing.assert_close(model_stock([one, zero, two], [1.0, 1.0, 0.5]), expected)
    torch.testing.assert_close(model_stock([one, one + 1, two], [1.0, 0.0, 0.5]), expected)
    assert torch.equal(model_stock([zero, zero], 1.0), zero)
    assert torch.equal(model_stock([one, two], 0.0), zero)
    only = dict(merge("model_stock", [{"a": one}, {"b": two}], 0.5))
    assert torch.equal(only["a"], one / 2)
    assert torch.equal(only["b"], two / 2)


def test_one_model_and_a_common_factor():
    one, two = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)) + 1
    assert torch.equal(model_stock([one], 1.0), one)
    torch.testing.assert_close(model_stock([one, two], 0.3), 0.3 * model_stock([one, two], 1.0))


@pytest.mark.parametrize("count", [2, 3])
def test_equals_mergekit(count):
    mergekit = pytest.importorskip("mergekit.merge_methods.api")
    base, *updates = torch.randn(count + 1, 5, 4, generator=torch.Generator().manual_seed(0))
    updates = [update + 0.7 for update in updates]
    theirs = mergekit.merge_tensors(
        [base, *(base + update for update in updates)], "model_stock", base_index=0
    )
    torch.testing.assert_close(base + model_stock(updates, 1.0), theirs, rtol=0, atol=1e-6)


def test_tensors_longer_than_a_piece():
    rows = torch.randn(2, 2**16 + 5, generator=torch.Generator().manual_seed(0)) + 1
    cos = float(torch.nn.functional.cosine_similarity(*rows.double(), dim=0))
    expected = 2 * cos / (1 + cos) * rows.mean(dim=0)
    torch.testing.assert_close(model_stock(list(rows), 1.0), expected)
