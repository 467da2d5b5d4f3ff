"""DELLA by hand, its chances against mergekit's, and its masks."""

import pytest
import torch

from trap2.attacks import della as module
from trap2.attacks.attack import merge
from trap2.attacks.vectors import TaskVector
from trap2.errors import UserError

ONE = {"w": torch.tensor([[1.0, -4.0, 2.0]])}
TWO = {"w": torch.tensor([[-3.0, 2.0, 1.0]])}


def della(updates, coefficients, density=0.5, epsilon=0.15, seed=0):
    parameters = {"density": density, "epsilon": epsilon, "seed": seed}
    return dict(merge("della", updates, coefficients, **parameters))["w"]


def test_by_hand(monkeypatch):
    # Ranks 0 1 1/2 and 1 1/2 0, so p = 0.3 0.7 0.5 and 0.7 0.5 0.3. With masks 1 1 0 and 1 0 1:
    # D1 = [1/0.3 -4/0.7 0], D2 = [-3/0.7 0 1/0.3]; sum < 0, < 0, > 0; agreeing {2} {1} {2}
    masks = iter([torch.tensor([[True, True, False]]), torch.tensor([[True, False, True]])])
    drops = []
    monkeypatch.setattr(module, "keep_mask", lambda _, d, __: drops.append(d) or next(masks))
    merged = della([ONE, TWO], 2.0, 0.5, 0.2)
    torch.testing.assert_close(merged, torch.tensor([[-6 / 0.7, -8 / 0.7, 2 / 0.3]]))
    torch.testing.assert_close(drops[0], torch.tensor([[0.7, 0.3, 0.5]]))
    torch.testing.assert_close(drops[1], torch.tensor([[0.3, 0.5, 0.7]]))


@pytest.mark.parametrize("shape", [(4, 6), (9,), (2, 3, 5)])
def test_the_chances_are_those_of_mergekit(monkeypatch, shape):
    sparsify = pytest.importorskip("mergekit.sparsify")
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    chances = []
    monkeypatch.setattr(torch, "bernoulli", lambda p: chances.append(p) or torch.ones_like(p))
    if len(shape) < 3:  # theirs ranks along the second dimension, also where it is not the last
        sparsify.della_magprune(tensor, 0.5, 0.2)
        ours = 0.3 + 0.4 * module.ranks(TaskVector.of({"w": tensor}), "w")
        torch.testing.assert_close(ours, chances[0].reshape(shape))
    ranks = module.ranks(TaskVector.of({"w": tensor}), "w")
    rows = ranks.reshape(-1, shape[-1]).sort().values
    torch.testing.assert_close(rows, torch.linspace(0, 1, shape[-1]).expand_as(rows))


@pytest.mark.parametrize("shape", [(), (1,), (3, 1)])
def test_the_only_entry_of_a_row_has_the_mean_chance(shape):
    ranks = module.ranks(TaskVector.of({"w": torch.ones(shape)}), "w")
    assert torch.equal(ranks, torch.full(shape, 0.5))


def test_the_mean_is_right_and_large_entries_stay_more_often():
    update = {"w": torch.linspace(1, 2, 100_000)}
    merged = della([update], 1.0, 0.5, 0.3)
    kept = (merged != 0).float()
    assert float(kept.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(kept[:1000].mean()) == pytest.approx(0.2, abs=0.05)
    assert float(kept[-1000:].mean()) == pytest.approx(0.8, abs=0.05)
    assert float(merged.mean()) == pytest.approx(1.5, abs=0.03)


def test_without_drop_it_is_ties_without_trimming():
    expected = dict(merge("ties", [ONE, TWO], [0.3, 0.9], density=1.0))["w"]
    assert torch.equal(della([ONE, TWO], [0.3, 0.9], 1.0, 0.0), expected)


def test_the_seed_decides_and_no_stream_moves():
    update = {"w": torch.linspace(1, 2, 64)}
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first = della([update], 1.0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(della([update], 1.0), first)
    assert not torch.equal(della([update], 1.0, seed=1), first)


def test_scale_and_coefficient_zero():
    assert torch.equal(4 * della([ONE, TWO], 0.5), della([ONE, TWO], 2.0))
    assert torch.equal(della([ONE, TWO], [1.0, 0.0]), della([ONE], 1.0))


def test_a_tensor_only_one_model_has():
    merged = merge("della", [{"a": torch.ones(2)}, ONE], 1.0, density=1.0, epsilon=0.0)
    assert list(dict(merged)) == ["a", "w"]


@pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.15), (0.9, 0.15), (0.5, -0.1), (0, 0)])
def test_chances_out_of_range(density, epsilon):
    message = (
        rf"density={density} with epsilon={epsilon} gives chances outside \(0, 1\]; use "
        "0 <= epsilon < density <= 1 - epsilon, such as"
    )
    with pytest.raises(UserError, match=message):
        della([ONE], 1.0, density, epsilon)
