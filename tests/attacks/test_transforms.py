"""Changes before a merge, each by hand."""

import pytest
import torch

from trap2.attacks.attack import merge
from trap2.errors import UserError

W = torch.tensor([[4.0, 0.0], [0.0, -1.0]])
ZERO = torch.zeros(2, 2)


def merged(name, *updates, coefficients=1.0, base=None, **params):
    whole = [{"w": u} for u in updates]
    return dict(merge(name, whole, coefficients, base=base, **params))["w"]


def test_truncating_keeps_the_largest_singular_values():
    found = merged("truncated", W, rank_kept=0.5)
    torch.testing.assert_close(found, torch.tensor([[4.0, 0.0], [0.0, 0.0]]))
    row = torch.tensor([1.0, 2.0])
    torch.testing.assert_close(merged("truncated", row, rank_kept=0.5), row)


def test_pruning_keeps_the_largest_entries_of_the_whole_update():
    update = {"a": torch.tensor([5.0, 1.0]), "b": torch.tensor([-4.0, 2.0])}
    found = dict(merge("pruned", [update], 2.0, density=0.5))
    assert torch.equal(found["a"], torch.tensor([10.0, 0.0]))
    assert torch.equal(found["b"], torch.tensor([-8.0, 0.0]))


def test_thinning_keeps_the_expectation():
    ones = torch.ones(200, 200)
    found = merged("thinned", ones, drop=0.75, seed=0)
    assert sorted(found.unique().tolist()) == [0.0, 4.0]
    assert float(found.mean()) == pytest.approx(1.0, abs=0.05)
    assert torch.equal(found, merged("thinned", ones, drop=0.75, seed=0))
    assert not torch.equal(found, merged("thinned", ones, drop=0.75, seed=1))


def test_rounding_is_of_the_released_weights_row_by_row():
    # 2 bits: the values of a row are -max, 0 and max
    base = {"w": torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])}
    update = torch.tensor([[3.0, 0.9, 1.5], [1.0, -0.2, 0.6]])  # weights 4, 1.9, 2.5 / 1, -.2, .6
    expected = torch.tensor([[4.0, 0.0, 4.0], [1.0, 0.0, 1.0]]) - base["w"]
    torch.testing.assert_close(merged("rounded", update, base=base, bits=2), expected)
    fine = merged("rounded", update, base=base, bits=8) - update
    assert 0 < float(fine.abs().max()) <= 0.5 * 4 / 127 + 1e-6


def test_noise_is_as_large_as_it_says():
    update = torch.full((200, 200), 3.0)
    added = merged("noisy", update, noise=0.5, seed=0) - update
    assert float(added.std()) == pytest.approx(1.5, rel=0.02)
    assert float(added.mean()) == pytest.approx(0.0, abs=0.05)
    two = merged("noisy", update, update, noise=0.5, seed=0) - 2 * update
    assert not torch.allclose(two, 2 * added)  # each model has noise of its own


NEUTRAL = {
    "truncated": {"rank_kept": 1.0},
    "pruned": {"density": 1.0},
    "thinned": {"drop": 0.0, "seed": 0},
    "rounded": {"bits": 24, "base": {"w": ZERO}},
    "noisy": {"noise": 0.0, "seed": 0},
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_the_neutral_value_is_task_arithmetic(name):
    one, two = torch.randn(2, 2, 2, generator=torch.Generator().manual_seed(0))
    found = merged(name, one, two, coefficients=[0.5, 2.0], **NEUTRAL[name])
    torch.testing.assert_close(found, 0.5 * one + 2 * two, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("truncated", {"rank_kept": 0.0}, "rank_kept=0.0 is no share of an update; use 0 < rank_k"),
        ("pruned", {"density": 1.5}, "density=1.5 is no share of an update; use 0 < density <= 1"),
        ("thinned", {"drop": 1.0}, "drop=1.0 leaves nothing; use 0 <= drop < 1, such as 0.5"),
        ("rounded", {"bits": 1, "base": {"w": ZERO}}, "bits=1 cannot be rounded to; use 2 to 24"),
        ("noisy", {"noise": -1.0}, "noise=-1.0 is no share; use 0 or more, such as 0.2"),
    ],
)
def test_values_that_mean_nothing_are_refused(name, params, message):
    with pytest.raises(UserError, match=message):
        merged(name, W, **params)
