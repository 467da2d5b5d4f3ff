"""The trap's gradient of a tensor is held to a multiple of the nominal one, and else left alone."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainees import DECOY, OFF, llama, lora, move, ragged, stacked
from trap2.errors import UserError
from trap2.protecting.cap import Cap
from trap2.protecting.config import Trap2Config
from trap2.protecting.losses import Outcome
from trap2.protecting.protector import Protector, default_forward

pytestmark = pytest.mark.usefixtures("way")
BATCH = stacked(ragged())
STRONG = replace(DECOY, strength=30.0)


def gradients(
    make: Callable[[], nn.Module],
    config: Trap2Config,
    batches: list[dict[str, Tensor]] | None = None,
    **more: Any,
) -> dict[str, Tensor]:
    """Gradients by name after one step, in float64."""
    batches = batches or [BATCH]
    model = make().double()
    protector = Protector(model, config, accumulation_steps=len(batches), **more)
    move(model)
    for batch in batches:
        protector.backward(batch)
    assert not any(p._backward_hooks for p in model.parameters())
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def capped(task: dict[str, Tensor], both: dict[str, Tensor], k: float) -> dict[str, Tensor]:
    """By hand: g + h min(1, k |g| / |h|)."""
    result = {}
    for name, g in task.items():
        h = both[name] - g
        result[name] = g + h * min(1.0, k * g.norm().item() / max(h.norm().item(), 1e-300))
    return result


@pytest.mark.parametrize("make", [llama, lora])
@pytest.mark.parametrize("strength", [0.05, 30.0])
@pytest.mark.parametrize("k", [0.3, 1.0, 5.0])
def test_it_is_the_formula(make: Callable[[], nn.Module], strength: float, k: float) -> None:
    free = replace(DECOY, strength=strength)
    task, both = gradients(make, OFF), gradients(make, free)
    found = gradients(make, replace(free, cap=k))
    expected = capped(task, both, k)
    for name, gradient in found.items():
        # transformers computes a causal model's loss in float32
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)
    held = [name for name in task if not torch.allclose(expected[name], both[name], rtol=1e-3)]
    if strength == 30.0:
        assert held
    elif k == 5.0:
        assert not held


def test_without_a_cap_nothing_is_changed_and_no_hook_is_set() -> None:
    model = lora()
    cap = Cap(model, 0.0)
    with cap.listening():
        assert not any(p._backward_hooks for p in model.parameters())
    free, capless = gradients(lora, STRONG), gradients(lora, replace(STRONG, cap=1e9))
    for name, gradient in free.items():
        torch.testing.assert_close(gradient, capless[name])


@pytest.mark.parametrize("make", [llama, lora])
def test_what_the_cap_saw_is_recorded(make: Callable[[], nn.Module]) -> None:
    free = replace(DECOY, strength=3.0)
    task, both = gradients(make, OFF), gradients(make, free)
    traps = {name: both[name] - g for name, g in task.items()}
    kept = [
        min(1.0, (g.norm() / traps[n].norm().clamp(min=1e-300)).item()) for n, g in task.items()
    ]
    against = [bool((g * traps[name]).sum() < 0) for name, g in task.items()]
    protector = Protector(make().double(), replace(free, cap=1.0))
    move(protector.model)
    protector.backward(BATCH)
    assert protector.last is not None
    seen = protector.last.pressure
    assert seen is not None
    assert seen.kept == pytest.approx(sum(kept) / len(kept), rel=1e-4)
    assert seen.conflict == pytest.approx(sum(against) / len(against))
    assert 0 < seen.conflict < 1
    assert 0 < seen.kept < 1


def test_without_a_cap_or_a_trap_there_is_nothing_to_record() -> None:
    for config in (STRONG, replace(OFF, cap=1.0), replace(STRONG, cap=1.0, warmup=1)):
        protector = Protector(lora(), config)
        protector.backward(BATCH)
        assert protector.last is not None
        assert protector.last.pressure is None


def test_every_micro_batch_is_judged_by_itself() -> None:
    parts = [stacked(ragged()[:2]), stacked(ragged()[2:])]
    config = replace(STRONG, cap=1.0)
    together = gradients(lora, config, parts)
    for name, gradient in together.items():
        alone = [gradients(lora, config, [part])[name] for part in parts]
        torch.testing.assert_close(gradient, sum(alone) / 2, rtol=1e-5, atol=1e-6)


def test_a_tensor_that_the_task_does_not_move_is_not_moved_by_the_trap() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 3), nn.Linear(4, 3)
            self.trap = False

        def forward(self, x: Tensor, labels: Tensor) -> Outcome:
            logits = self.used(x) + (self.idle(x) if self.trap else 0.0)
            return Outcome(nn.functional.cross_entropy(logits, labels), logits, labels)

    def forward(model: Any, batch: Mapping[str, Any]) -> Outcome:
        outcome: Outcome = model(**batch)
        model.trap = not model.trap
        return outcome

    torch.manual_seed(0)
    batch = {"x": torch.randn(6, 4), "labels": torch.arange(6) % 3}
    for k, moved in ((0.0, True), (1.0, False)):
        model = Gated()
        Protector(model, replace(STRONG, cap=k), forward=forward).backward(batch)
        grad = model.idle.weight.grad
        assert (grad is not None and bool(grad.any())) is moved
        assert model.used.weight.grad is not None
        assert model.used.weight.grad.any()


def test_a_trap_that_is_not_finite_is_dropped_all_the_same() -> None:
    calls: list[int] = []

    def forward(model: nn.Module, batch: Mapping[str, Any]) -> Outcome:
        calls.append(1)
        outcome = default_forward(model, batch)
        if len(calls) % 2:
            return outcome
        assert outcome.logits is not None
        return Outcome(outcome.loss, outcome.logits * torch.inf, outcome.labels)

    task = gradients(lora, OFF)
    found = gradients(lora, replace(STRONG, cap=1.0), forward=forward)
    assert all(torch.equal(found[name], task[name]) for name in task)


def test_gradients_that_arrive_in_parts_count_together() -> None:
    """A tensor shared by two checkpointed segments hands over its gradient twice."""
    weight = nn.Linear(3, 3, bias=False).double()
    cap = Cap(weight, 1.0)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    with cap.listening():
        checkpoint(
            weight, checkpoint(weight, x, use_reentrant=True), use_reentrant=True
        ).sum().backward()
    (square,) = cap._squares.values()
    assert square > 0
    assert len(cap._squares) == 1


def test_a_cap_below_zero_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        Trap2Config(cap=-1.0)
    assert str(caught.value) == "cap=-1.0 is out of range; it must be finite and 0 or more"
