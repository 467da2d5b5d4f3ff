"""Protection for transformers' Trainer and its subclasses: one changed line.

Trainer = protect_trainer(Trainer)
Trainer(model=model, args=args, train_dataset=data, trap2=Trap2Config()).train()
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trap2.errors import Unsupported
from trap2.protecting.batches import part_of
from trap2.protecting.config import Trap2Config
from trap2.protecting.losses import Outcome
from trap2.protecting.memory import RowMemory
from trap2.protecting.protector import trap_value
from trap2.protecting.scaled import LiveUpdate
from trap2.protecting.step import StepRecord, trap_step

GENERATING = ("GRPOTrainer", "RLOOTrainer")
"""Trainers that count generated batches inside `training_step`, which we call twice."""


def protect_trainer(trainer_class: type) -> Any:
    """Make a Trainer class that protects what it trains.

    Args:
        trainer_class: `transformers.Trainer` or a subclass of it.

    Returns:
        A subclass whose constructor takes one more keyword, `trap2: Trap2Config`.

    Raises:
        Unsupported: The trainer generates its own batches.
    """
    names = [base.__name__ for base in trainer_class.__mro__]
    for name in GENERATING:
        if name in names:
            raise Unsupported(
                f"{name} counts generated batches in training_step, which protection runs twice; "
                "protect the supervised stage that follows instead"
            )
    return type(f"Protected{trainer_class.__name__}", (_ProtectedMixin, trainer_class), {})


class _ProtectedMixin:
    """`training_step` twice: as it is, then scaled with the trap as its loss."""

    state: Any
    model: Any
    args: Any
    accelerator: Any
    current_gradient_accumulation_steps: int

    def __init__(self, *args: Any, trap2: Trap2Config | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.trap2 = trap2 if trap2 is not None else Trap2Config()
        self.update = LiveUpdate(self.model)
        self.memory = RowMemory(self.trap2.memory)
        self.last: StepRecord | None = None
        self._factor: float | None = None
        self._scale = 1.0
        self._trap: Tensor | None = None
        self._counts_items: bool | None = None
        self._records: list[StepRecord] = []

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        step = super().training_step  # type: ignore[misc]
        losses: list[Tensor] = []

        def nominal() -> Tensor:
            losses.append(step(model, inputs, *args, **kwargs))
            return losses[0]

        def scaled(part: int, s: float, factor: float) -> Tensor:
            rows = part_of(inputs, self.trap2.fraction, part, self.trap2.scales_per_step)
            self._factor, self._scale = factor, s
            try:
                step(model, rows, *args, **kwargs)
            finally:
                self._factor = None
            assert self._trap is not None
            return self._trap

        self.last = trap_step(
            nominal, scaled, update=self.update, config=self.trap2, step=self.state.global_step
        )
        self._records.append(self.last)
        return losses[0]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        **kwargs: Any,
    ) -> Any:
        compute = super().compute_loss  # type: ignore[misc]
        items = kwargs.pop("num_items_in_batch", None)
        if self._factor is None:
            watched = self._watched(items)
            result = compute(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=watched, **kwargs
            )
            if watched is not items:
                loss = result[0] if return_outputs else result
                seen = torch.autograd.grad(
                    loss.sum(), watched, retain_graph=True, allow_unused=True
                )
                self._counts_items = seen[0] is not None
            return result
        labels = inputs.get("labels")
        # Without a count every loss is a mean over the rows at hand.
        loss, outputs = compute(model, inputs, return_outputs=True, **kwargs)
        logits = outputs.get("logits")
        value = trap_value(Outcome(loss, logits, labels), self.trap2, self.memory, self._scale)
        self._trap = value.detach()
        scaled_loss = value * (self._factor * self._share(items))
        return (scaled_loss, outputs) if return_outputs else scaled_loss

    def _watched(self, items: Any) -> Any:
        """The item count, for one training pass as a tensor that tells whether the loss uses it."""
        known = self._counts_items is not None or self.trap2.strength == 0
        if items is None or known or not torch.is_grad_enabled():
            return items
        return torch.as_tensor(items).detach().to(torch.float32, copy=True).requires_grad_()

    def _share(self, items: Any) -> float:
        """What `compute_loss` multiplies a micro-batch's mean loss by; the trap gets the same.

        Given an item count, the trainer leaves the division by the accumulation steps to the model
        and multiplies by the processes. Models that sum over items do divide. Most task heads
        ignore the count: their nominal loss stays that many times larger, and so must the trap.
        """
        if items is None:
            return 1.0
        if self._counts_items:
            return 1.0 / self.current_gradient_accumulation_steps
        averaged = self.args.average_tokens_across_devices
        return float(self.accelerator.num_processes) if averaged else 1.0

    def _save_rng_state(self, output_dir: str) -> None:
        """Beside the random streams, keep what the read-out adversary remembers."""
        super()._save_rng_state(output_dir)  # type: ignore[misc]
        kept = self.memory.state_dict()
        if kept:
            save_file(kept, self._memory_file(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)  # type: ignore[misc]
        if checkpoint is not None and self._memory_file(checkpoint).is_file():
            self.memory.load_state_dict(load_file(self._memory_file(checkpoint)))

    def _memory_file(self, checkpoint: str) -> Path:
        return Path(checkpoint) / f"trap2_memory_{self.args.process_index}.safetensors"

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the trap's own numbers to whatever the trainer logs about a step."""
        trapped = [r for r in self._records if r.trap is not None]
        if "loss" in logs and trapped:
            logs["trap2/trap_loss"] = sum(r.trap or 0.0 for r in trapped) / len(trapped)
            logs["trap2/strength"] = self.trap2.strength_at(self.state.global_step - 1)
        if "loss" in logs:
            self._records.clear()
        super().log(logs, *args, **kwargs)  # type: ignore[misc]
