"""Traps that are not finite are dropped, counted and logged; too many of them stop training."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import trainees
from trainees import DECOY, OFF, Overflow, distance, gradients, llama, lora, move, ragged, stacked
from trap2.errors import TrainingStopped
from trap2.protecting.guard import RECENT, TOLERATED, Guard
from trap2.protecting.losses import Outcome
from trap2.protecting.protector import Protector, default_forward
from trap2.protecting.trainer import protect_trainer

BREAKS: dict[str, Callable[[Tensor], Tensor]] = {
    "nan loss": lambda logits: logits * torch.nan,
    "infinite loss": lambda logits: logits + torch.tensor(torch.inf),
    "infinite gradient": Overflow.apply,
}


def breaking(change: Callable[[Tensor], Tensor], passes: set[int]) -> Any:
    """A forward whose logits break in the trap passes given; every second pass is a trap's."""
    calls: list[int] = []

    def forward(model: nn.Module, batch: Mapping[str, Any]) -> Outcome:
        calls.append(1)
        outcome = default_forward(model, batch)
        if len(calls) % 2 == 0 and len(calls) // 2 in passes:
            assert outcome.logits is not None
            return Outcome(outcome.loss, change(outcome.logits), outcome.labels)
        return outcome

    return forward


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("make", [llama, lora])
@pytest.mark.parametrize("broken", list(BREAKS))
def test_a_broken_trap_leaves_the_nominal_gradient_alone(
    make: Callable[[], nn.Module], broken: str
) -> None:
    batch = stacked(ragged())

    def run(config: Any, **more: Any) -> tuple[Tensor, Protector]:
        model = make()
        protector = Protector(model, config, **more)
        move(model)
        protector.backward(batch)
        assert not any(p._backward_hooks for p in model.parameters())
        return gradients(model), protector

    nominal, _ = run(OFF)
    gradient, protector = run(DECOY, forward=breaking(BREAKS[broken], {1}))
    assert torch.equal(gradient, nominal)
    assert protector.last is not None
    assert (protector.last.trap, protector.last.dropped, protector.dropped) == (None, 1, 1)
    whole, sound = run(DECOY, forward=breaking(BREAKS[broken], set()))
    assert distance(whole, nominal) > 1e-2
    assert sound.dropped == 0


@pytest.mark.usefixtures("way")
def test_an_overflow_is_left_to_a_gradient_scaler() -> None:
    """It must see it, to skip the step and to scale less from then on."""
    model = lora()
    forward = breaking(BREAKS["infinite gradient"], {1})
    protector = Protector(model, DECOY, forward=forward, backward=lambda loss: loss.backward())
    protector.backward(stacked(ragged()))
    assert not gradients(model).isfinite().all()
    assert protector.dropped == 0


@pytest.mark.usefixtures("way")
def test_more_than_a_tenth_of_the_recent_passes_stops_training() -> None:
    model, batch = lora(), stacked(ragged(2))
    first = set(range(1, TOLERATED + 1))
    later = {RECENT + 1, RECENT + 2}  # as each comes, one of the first is forgotten
    protector = Protector(model, DECOY, forward=breaking(BREAKS["nan loss"], first | later))
    for _ in range(RECENT + 2):
        protector.backward(batch)
    assert protector.dropped == TOLERATED + 2
    broken = Protector(lora(), DECOY, forward=breaking(BREAKS["nan loss"], set(range(100))))
    for _ in range(TOLERATED):
        broken.backward(batch)
    with pytest.raises(TrainingStopped) as caught:
        broken.backward(batch)
    assert str(caught.value) == (
        "6 of the last 6 trap passes were not finite (at most 5 of 50 are dropped); training "
        "stopped: lower the learning rate, the strength or `high`, or compute in bfloat16 or "
        "float32"
    )


def test_sharded_gradients_cannot_be_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora()
    monkeypatch.setattr("trap2.protecting.guard.is_sharded", lambda tensor: True)
    guard = Guard(model, has_scaler=False)
    with guard.watch():
        guard.see(torch.tensor(1.0))
    with pytest.raises(TrainingStopped, match="gradients of sharded parameters"), guard.watch():
        guard.see(torch.tensor(torch.nan))


class Fragile(nn.Module):
    """Breaks off its own scale: what it adds up overflows above a size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.classifier = nn.Embedding(24, 8), nn.Linear(8, 3)
        self.traps = 0

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.classifier(self.body(input_ids).mean(1).tanh())
        loss = nn.functional.cross_entropy(logits, labels)
        if any(p._backward_hooks for p in self.parameters()):  # a trap's pass
            self.traps += 1
            logits = logits * (torch.nan if self.traps in (2, 5) else 1.0)
        return {"loss": loss, "logits": logits}


def test_the_trainer_logs_and_counts_them(tmp_path: Path) -> None:
    """One record a step; what a resumed run has dropped before counts too."""
    data = [{"input_ids": torch.arange(i, i + 4), "labels": i % 3} for i in range(12)]

    def run(checkpoint: str | None) -> Any:
        changes = {"max_steps": 6, "save_strategy": "steps", "save_steps": 4}
        model = Fragile()
        model.traps = 0 if checkpoint is None else 4
        trainer = protect_trainer(Trainer)(
            model=model,
            args=TrainingArguments(**trainees.settings(tmp_path, **changes)),
            train_dataset=data,
            trap2=DECOY,
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    trainer = run(None)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["trap2/dropped"] for entry in logs] == [0, 1, 0, 0, 1, 0]
    assert ["trap2/trap_loss" in entry for entry in logs] == [True, False, True, True, False, True]
    scales = [DECOY.law_at(step).draw(0, step)[0] for step in range(6)]
    assert [entry["trap2/scale"] for entry in logs] == scales
    assert trainer.dropped == 2
    assert run(str(tmp_path / "checkpoint-4")).dropped == 2
