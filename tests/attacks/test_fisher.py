"""Fisher merging against gradients worked out by hand."""

import pytest
import torch
from torch.nn import functional as F

from attacks.tiny import BIAS, FIRST, SECOND, World
from trap2.attacks.attack import merge
from trap2.attacks.fisher import FLOOR, importance
from trap2.attacks.vectors import TaskVector


@pytest.fixture(scope="module")
def world():
    return World()


def test_importance_is_the_mean_squared_gradient_of_drawn_answers(world):
    """The last layer by hand: d log p_y / dW = sum_t (head_y - p @ head) (1 - h^2) x' / tokens."""
    update, model = world.updates[0], world.models[0]
    found = importance(TaskVector.of(update), world.data[0], tuple(update), seed=3)
    draw = torch.Generator().manual_seed(3)
    total = torch.zeros(3, 3)
    for row in range(20):
        inputs = torch.tanh(
            world.x[0][row] @ world.weight(FIRST, update[FIRST]).T
            + world.weight(BIAS, update[BIAS])
        )
        bias = world.weight("blocks.1.linear.bias", update["blocks.1.linear.bias"])
        h = torch.tanh(inputs @ world.weight(SECOND, update[SECOND]).T + bias)
        used = world.mask[0][row].unsqueeze(1) / world.mask[0][row].sum()
        p = F.softmax((h * used).sum(0) @ model.head.T, dim=0)
        y = int(torch.multinomial(p.unsqueeze(0), 1, generator=draw))
        slope = (model.head[y] - p @ model.head) * (1 - h.square()) * used
        total += (slope.T @ inputs).square()
    torch.testing.assert_close(
        found[SECOND] / found[SECOND].mean(), total / total.mean(), rtol=1e-3, atol=1e-4
    )
    entries = torch.cat([weights.flatten() for weights in found.values()])
    assert float(entries.mean()) == pytest.approx(1.0, rel=1e-5)
    assert float(entries.min()) >= FLOOR


def test_the_merge_is_the_weighted_mean(world):
    vectors = [TaskVector.of(u) for u in world.updates]
    names = tuple(world.updates[0])
    F0, F1 = (importance(v, d, names, 0) for v, d in zip(vectors, world.data, strict=True))
    found = dict(merge("fisher", vectors, [1.0, 0.5], data=world.data, seed=0))
    for n in names:
        expected = F0[n] * world.updates[0][n] + 0.5 * F1[n] * world.updates[1][n]
        torch.testing.assert_close(found[n], expected / (F0[n] + F1[n]))


def test_one_model_is_that_model_and_models_at_0_are_left_out(world):
    for coefficients in ([1.0, 0.0], [1.0]):
        models = world.updates[: len(coefficients)]
        found = dict(merge("fisher", models, coefficients, data=world.data[: len(models)], seed=0))
        for name, delta in world.updates[0].items():
            torch.testing.assert_close(found[name], delta)
    nothing = dict(merge("fisher", world.updates, 0.0, data=world.data, seed=0))
    assert not any(delta.any() for delta in nothing.values())


def test_an_update_that_lacks_a_tensor_counts_as_zero_there(world):
    part = {SECOND: world.updates[1][SECOND]}
    found = dict(merge("fisher", [world.updates[0], part], 1.0, data=world.data, seed=0))
    assert set(found) == set(world.updates[0])
    assert (found[FIRST].abs() <= world.updates[0][FIRST].abs()).all()
