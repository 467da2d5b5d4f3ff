"""A trap is eased where the task is being lost, and nowhere else."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from trainees import DECOY, lora, move, ragged, stacked
from trap2.protecting.easing import BLOCK, BLOCKS, LEAST, Easing
from trap2.protecting.protector import Protector

CPU = torch.device("cpu")


def factors(losses: list[float], ease: float = 1.5) -> list[float]:
    """The factor after each step."""
    easing, found = Easing(ease), []
    for step, loss in enumerate(losses):
        easing.note(step, loss, CPU)
        found.append(easing.factor)
    return found


def course(*levels: float) -> list[float]:
    return [level for level in levels for _ in range(BLOCK * BLOCKS)]


def test_a_task_that_is_learned_keeps_its_trap() -> None:
    assert set(factors(course(0.8, 0.5, 0.6, 0.4, 0.55, 0.3))) == {1.0}  # worst rise: 1.375
    assert set(factors(course(0.8, 0.01, 0.04, 0.01))) == {1.0}  # fourfold, and next to nothing


@pytest.mark.parametrize("low", [0.0, -0.5])
def test_losses_that_reach_zero_ease_nothing(low: float) -> None:
    assert set(factors(course(0.8, low, 0.7, 0.7))) == {1.0}


def test_a_task_that_is_being_lost_eases_it_and_one_that_comes_back_restores_it() -> None:
    found = factors(course(0.8, 0.3, 0.7, 0.7, 0.25, 0.25, 0.25))
    lost, back = found[: 4 * BLOCK * BLOCKS], found[-1]
    assert lost[2 * BLOCK * BLOCKS] == 1.0
    assert min(lost) < 0.1
    assert min(found) >= LEAST
    assert back == 1.0


def test_without_a_limit_nothing_is_watched() -> None:
    easing = Easing(0.0)
    for step, loss in enumerate(course(0.1, 5.0)):
        easing.note(step, loss, CPU)
    assert easing.factor == 1.0
    assert easing.state_dict() == {}


@pytest.mark.parametrize("at", [3, 57, 160])
def test_a_resumed_run_eases_as_the_uninterrupted_one(at: int) -> None:
    losses = course(0.8, 0.3, 0.7, 0.6, 0.2)
    first = Easing(1.5)
    for step, loss in enumerate(losses[:at]):
        first.note(step, loss, CPU)
    second = Easing(1.5)
    second.load_state_dict(first.state_dict())
    rest = []
    for step, loss in enumerate(losses[at:], at):
        second.note(step, loss, CPU)
        rest.append(second.factor)
    assert rest == factors(losses)[at:]


@pytest.mark.parametrize("cap", [0.0, 0.5])
def test_an_eased_trap_is_one_of_less_strength_and_cap(cap: float) -> None:
    def gradients(factor: float, **changes: float) -> list[Tensor]:
        model = lora()
        protector = Protector(model, replace(DECOY, **{"strength": 3.0, "cap": cap, **changes}))
        move(model)
        protector._keeper.easing.factor = factor
        protector.backward(stacked(ragged()))
        return [p.grad for p in model.parameters() if p.grad is not None]

    eased = gradients(0.25)
    less = gradients(1.0, strength=0.75, cap=0.25 * cap)
    assert len(eased) == len(less) > 0
    for one, other in zip(eased, less, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)
    assert not all(map(torch.equal, eased, gradients(1.0)))
