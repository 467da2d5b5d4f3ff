"""Breadcrumbs by hand, at its ends, and against mergekit."""

import pytest
import torch

from trap2.attacks.attack import merge
from trap2.errors import UserError

ONE = {"w": torch.tensor([[4.0, -1.0], [3.0, 2.0]])}
TWO = {"w": torch.tensor([[-2.0, -5.0], [6.0, 1.0]])}


def breadcrumbs(updates, coefficients, density=0.5, gamma=0.25):
    parameters = {"density": density, "gamma": gamma}
    return dict(merge("breadcrumbs", updates, coefficients, **parameters))


def test_by_hand():
    # Of four entries the largest is left out and the next two stay:
    # [0 0; 3 2] + 0.5 * [-2 -5; 0 0] = [-1 -2.5; 3 2]
    merged = breadcrumbs([ONE, TWO], [1.0, 0.5])["w"]
    assert torch.equal(merged, torch.tensor([[-1.0, -2.5], [3.0, 2.0]]))


def test_each_tensor_has_its_own_bounds():
    update = {"a": torch.tensor([1.0, -2.0, 3.0, 4.0]), "b": torch.tensor([90.0, 80.0, 70.0, 60.0])}
    merged = breadcrumbs([update], 1.0)
    assert torch.equal(merged["a"], torch.tensor([0.0, -2.0, 3.0, 0.0]))
    assert torch.equal(merged["b"], torch.tensor([0.0, 80.0, 70.0, 0.0]))


def test_fewer_outliers_are_left_out_where_all_else_is_kept():
    assert torch.equal(breadcrumbs([ONE], 1.0, 1.0, 0.5)["w"], ONE["w"])
    kept = breadcrumbs([ONE], 1.0, 0.75, 0.9)["w"]
    assert torch.equal(kept, torch.tensor([[0.0, -1.0], [3.0, 2.0]]))


def test_at_least_one_entry_is_kept_and_entries_that_tie_all_are():
    assert torch.equal(breadcrumbs([ONE], 1.0, 0.01, 0.0)["w"], torch.tensor([[4.0, 0], [0, 0]]))
    same = {"w": torch.tensor([1.0, -1.0, 1.0])}
    assert torch.equal(breadcrumbs([same], 1.0, 0.4)["w"], same["w"])


def test_without_masks_it_is_task_arithmetic():
    updates = [ONE, {"v": torch.ones(2), "e": torch.zeros(0)}]
    expected = dict(merge("task_arithmetic", updates, [0.3, -2.0]))
    merged = breadcrumbs(updates, [0.3, -2.0], 1.0, 0.0)
    assert list(merged) == list(expected)
    assert all(torch.equal(merged[name], expected[name]) for name in merged)


@pytest.mark.parametrize(("density", "gamma"), [(0.3, 0.1), (0.9, 0.4), (1.0, 0.2)])
def test_equals_mergekit(density, gamma):
    mergekit = pytest.importorskip("mergekit.merge_methods.api")
    base, one, two = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    theirs = mergekit.merge_tensors(
        [base, base + one, base + two],
        "breadcrumbs",
        base_index=0,
        parameters={
            "weight": {1: 0.3, 2: -0.7},
            "density": density,
            "gamma": gamma,
            "normalize": False,
            "rescale": False,
        },
    )
    ours = breadcrumbs([{"w": one}, {"w": two}], [0.3, -0.7], density, gamma)["w"]
    torch.testing.assert_close(base + ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("density", "gamma"), [(0.0, 0.1), (1.5, 0.1), (0.5, 1.0), (0.5, -0.1)])
def test_shares_out_of_range(density, gamma):
    message = (
        f"density={density} with gamma={gamma} keeps no share of an update; use "
        "0 < density <= 1 and 0 <= gamma < 1, such as density=0.15 and gamma=0.01"
    )
    with pytest.raises(UserError, match=message):
        breadcrumbs([ONE], 1.0, density, gamma)
