"""A run resumed in the middle is the uninterrupted run, bit for bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import trainees
from trainees import llama, lora, ragged
from trap2.protecting import easing
from trap2.protecting.config import Trap2Config
from trap2.protecting.trainer import protect_trainer

CONFIG = Trap2Config(
    warmup=2, ramp=3, closing=3, fraction=0.5, memory=16, scales_per_step=2, ease=1.01
)


def dropping() -> nn.Module:
    return lora(dropout=0.3)


def test_a_checkpoint_without_the_traps_memory_is_named(tmp_path: Path) -> None:
    """A plain run's, say: training goes on, but not as if nothing had happened."""

    def run(trap2: Trap2Config, checkpoint: str | None = None) -> Any:
        changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        trainer = protect_trainer(Trainer)(
            model=lora(),
            args=TrainingArguments(**trainees.settings(tmp_path, **changes)),
            train_dataset=ragged(),
            trap2=trap2,
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    run(trainees.OFF)
    checkpoint = tmp_path / "checkpoint-2"
    missing = checkpoint / "trap2_memory_0.safetensors"
    assert not missing.exists()
    with pytest.warns(UserWarning, match="trap2_memory_0") as caught:
        run(CONFIG, str(checkpoint))
    assert (
        f"{missing}: not there; what the trap remembers starts empty, so that this run is not what "
        "the uninterrupted one would have been: resume from a protected run's checkpoint, with as "
        "many processes"
    ) in [str(warning.message) for warning in caught]


class Scales(TrainerCallback):
    def __init__(self) -> None:
        self.trainer: Any = None
        self.seen: list[tuple[float, ...]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(self.trainer.last.scales)


@pytest.mark.parametrize("make", [llama, dropping])
def test_a_resumed_trainer_is_the_uninterrupted_one(
    make: Callable[[], nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Optimizer, schedule, dropout, order of rows, scales; the trap's memory and its easing."""
    for name, value in {"BLOCK": 1, "BLOCKS": 2, "FAR": 0.0}.items():
        monkeypatch.setattr(easing, name, value)

    def run(resume: bool) -> tuple[dict[str, Tensor], list[tuple[float, ...]], list[Any]]:
        model, scales = make(), Scales()
        changes = {
            "max_steps": 8,
            "save_strategy": "steps",
            "save_steps": 5,
            "gradient_accumulation_steps": 2,
            "per_device_train_batch_size": 2,
            "max_grad_norm": 1.0,
            "logging_steps": 1,
        }
        trainer = protect_trainer(Trainer)(
            model=model,
            args=TrainingArguments(**trainees.settings(tmp_path, **changes)),
            train_dataset=ragged(12),
            trap2=CONFIG,
            callbacks=[scales],
        )
        scales.trainer = trainer
        torch.rand(int(resume))  # the stream stands elsewhere: the checkpoint's must be taken up
        checkpoint = str(tmp_path / "checkpoint-5") if resume else None
        trainer.train(resume_from_checkpoint=checkpoint)
        logs = [
            [entry[key] for key in ("step", "loss", "trap2/trap_loss", "trap2/eased")]
            for entry in trainer.state.log_history
            if "trap2/trap_loss" in entry
        ]
        return trainees.weights(model), scales.seen, logs

    weights, scales, logs = run(resume=False)
    again, resumed_scales, resumed_logs = run(resume=True)
    assert len(set(scales)) == 7  # two of them the warm-up's empty tuple
    assert resumed_scales == scales[5:]
    assert resumed_logs == logs
    assert min(eased for *_, eased in logs) < 1.0
    for name, value in weights.items():
        assert torch.equal(again[name], value), name
