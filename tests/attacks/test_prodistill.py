"""ProDistill: where it starts, what it must find where that is known, and that errors shrink."""

import pytest
import torch

from attacks.tiny import FIRST, SECOND, World
from trap2.attacks.attack import merge


@pytest.fixture(scope="module")
def world():
    return World()


def merged(world, coefficients, models=(0, 1), steps=50, learning_rate=0.01):
    updates, data = ([whole[i] for i in models] for whole in (world.updates, world.data))
    budget = {"steps": steps, "learning_rate": learning_rate}
    return dict(merge("prodistill", updates, coefficients, data=data, **budget))


def test_without_steps_it_is_task_arithmetic(world):
    plain = dict(merge("task_arithmetic", world.updates, [0.3, 0.6]))
    found = merged(world, [0.3, 0.6], steps=0)
    assert all(torch.equal(found[n], plain[n]) for n in plain)


def test_one_model_at_1_is_that_model(world):
    found = merged(world, 1.0, models=(0,))
    for name, delta in world.updates[0].items():
        torch.testing.assert_close(found[name], delta, rtol=0, atol=1e-5)
    dropped = merged(world, [1.0, 0.0])
    assert all(torch.equal(dropped[n], found[n]) for n in found)
    assert not any(delta.any() for delta in merged(world, 0.0).values())


def test_from_half_the_way_one_model_is_found_again(world):
    """With one model the error is zero at coefficients of 1 and nowhere else."""
    found = merged(world, 0.5, models=(0,), steps=1500)
    for name in (FIRST, SECOND):
        torch.testing.assert_close(found[name], world.updates[0][name], rtol=0, atol=0.02)


def test_the_merged_model_gives_the_features_of_the_models(world):
    def error(deltas):
        return sum(
            float((world.after_first(i, deltas) - world.after_first(i, u)).square().mean())
            for i, u in enumerate(world.updates)
        )

    assert error(merged(world, 0.5)) < 0.9 * error(merged(world, 0.5, steps=0))
