"""AdaMerging: its entropy, the direction of its first step, and that it is sure in the end."""

import math

import pytest
import torch

from attacks.tiny import FIRST, World
from trap2.attacks.adamerging import entropy
from trap2.attacks.attack import merge

BUDGET = {"steps": 1, "learning_rate": 0.01}


@pytest.fixture(scope="module")
def world():
    return World()


def merged(world, coefficients, layerwise, **budget):
    params = {"layerwise": layerwise, **BUDGET, **budget}
    return dict(merge("adamerging", world.updates, coefficients, data=world.data, **params))


def total_entropy(world, deltas, rows=slice(None)):
    return float(sum(entropy(world.logits(i, deltas)[rows]) for i in range(2)))


def test_entropy_by_hand():
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    second = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert float(entropy(logits)) == pytest.approx((math.log(2) + second) / 2)


def test_without_steps_it_is_task_arithmetic(world):
    plain = dict(merge("task_arithmetic", world.updates, [0.3, 0.6]))
    for layerwise in (False, True):
        found = merged(world, [0.3, 0.6], layerwise, steps=0)
        for name in plain:
            torch.testing.assert_close(found[name], plain[name])


@pytest.mark.parametrize("layerwise", [False, True])
def test_the_first_step_goes_down_the_entropy_of_the_first_batch(world, layerwise):
    """Adam's first step is the learning rate against the sign of the gradient."""
    start = [0.3, 0.3]
    found = merged(world, start, layerwise)
    names = list(world.updates[0])
    for model in range(2):
        for group in [[n] for n in names] if layerwise else [names]:
            slope = []
            for move in (1e-3, -1e-3):
                deltas = dict(merge("task_arithmetic", world.updates, start))
                for n in group:
                    deltas[n] = deltas[n] + move * world.updates[model][n]
                slope.append(total_entropy(world, deltas, slice(0, 16)))
            sign = math.copysign(1.0, slope[0] - slope[1])
            for n in group:
                others = 0.3 * world.updates[1 - model][n]
                # take off the other model's part, which moved by at most the learning rate
                moved = torch.stack([u[n].flatten() for u in world.updates], 1)
                parts = torch.linalg.lstsq(moved, found[n].flatten().unsqueeze(1)).solution
                assert float(parts[model]) == pytest.approx(0.3 - 0.01 * sign, abs=1e-3)
                assert others.shape == found[n].shape


def test_it_becomes_surer(world):
    before = total_entropy(world, merged(world, 0.3, True, steps=0))
    after = total_entropy(world, merged(world, 0.3, True, steps=30))
    assert after < before


def test_models_at_0_are_left_out(world):
    found = merged(world, [1.0, 0.0], False, steps=0)
    torch.testing.assert_close(found[FIRST], world.updates[0][FIRST])
    assert not any(delta.any() for delta in merged(world, 0.0, True).values())
