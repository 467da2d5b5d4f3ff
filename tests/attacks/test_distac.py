"""DisTaC, and the training it is made of."""

import pytest
import torch

from attacks.tiny import World
from trap2.attacks.attack import merge
from trap2.attacks.tuning import answers, imitation, tuned
from trap2.attacks.vectors import TaskVector

BUDGET = {"learning_rate": 0.01, "seed": 0}


@pytest.fixture(scope="module")
def world():
    return World()


def merged(world, updates, coefficients, scale, steps):
    data = world.data[: len(updates)]
    params = {"scale": scale, "steps": steps, **BUDGET}
    return dict(merge("distac", updates, coefficients, data=data, **params))


def test_without_steps_it_is_task_arithmetic_of_the_resized_updates(world):
    plain = dict(merge("task_arithmetic", world.updates, [0.3, 0.6]))
    found = merged(world, world.updates, [0.3, 0.6], 0.5, 0)
    for name in plain:
        torch.testing.assert_close(found[name], 0.5 * plain[name])


def test_the_skill_comes_back_at_the_new_size(world):
    update = world.updates[0]
    wanted = answers(world.data[0], update)
    half = {name: 0.5 * delta for name, delta in update.items()}
    found = merged(world, [update], 1.0, 0.5, 60)
    gap, before = (float(imitation(world.logits(0, deltas), wanted)) for deltas in (found, half))
    least = float(imitation(world.logits(0, update), wanted))
    assert gap - least < 0.3 * (before - least)


def test_an_update_at_the_minimum_stays(world):
    found = merged(world, [world.updates[0]], 1.0, 1.0, 3)
    for name, delta in world.updates[0].items():
        torch.testing.assert_close(found[name], delta, rtol=0, atol=0.05)


def test_an_update_is_re_encoded_once_for_all_coefficients(world, monkeypatch):
    from trap2.attacks import distac

    ran = []
    monkeypatch.setattr(distac, "tuned", lambda *a, **k: ran.append(1) or tuned(*a, **k))
    vectors = [TaskVector.of(u) for u in world.updates]
    first = merged(world, vectors, 1.0, 0.5, 2)
    second = merged(world, vectors, 0.5, 0.5, 2)
    third = merged(world, vectors, [1.0, 0.0], 0.5, 2)
    assert len(ran) == 2
    for name in first:
        torch.testing.assert_close(second[name], 0.5 * first[name])
        assert not torch.equal(third[name], first[name])


def test_training_is_adam_by_hand_and_sees_every_row_once_an_epoch(world):
    seen = []
    data = world.data[0]
    real, start = data.batch, world.updates[0]
    labels = torch.arange(20) % 3
    data.batch = lambda places: seen.extend(places) or real(places)
    loss = torch.nn.functional.cross_entropy
    try:
        course = tuned(data, start, labels, loss, steps=5, learning_rate=0.01, seed=4)
        steps = [(step, {n: d.detach().clone() for n, d in at.items()}) for step, at in course]
    finally:
        data.batch = real
    assert [step for step, _ in steps] == [0, 1, 2, 3, 4, 5]
    assert all(torch.equal(steps[0][1][n], start[n]) for n in start)
    assert sorted(seen[:20]) == sorted(seen[20:40]) == list(range(20))
    leaves = {n: d.clone().requires_grad_() for n, d in start.items()}
    value = loss(data.logits(leaves, data.batch(seen[:16])), labels[seen[:16]])
    for (name, leaf), slope in zip(
        leaves.items(), torch.autograd.grad(value, list(leaves.values())), strict=True
    ):
        big = slope.abs() > 1e-5  # the first step of Adam
        moved = steps[1][1][name] - leaf.detach()
        torch.testing.assert_close(moved[big], -0.01 * slope.sign()[big], rtol=1e-2, atol=1e-5)


def test_imitation_is_least_where_the_answers_agree():
    wanted = torch.tensor([[0.75, 0.25]])
    at = float(imitation(wanted.log(), wanted))
    assert at == pytest.approx(-(0.75 * torch.tensor(0.75).log() + 0.25 * torch.tensor(0.25).log()))
    assert float(imitation(torch.zeros(1, 2), wanted)) > at
