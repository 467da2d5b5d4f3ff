"""Protection for hand-written PyTorch loops: one changed line.

protector = Protector(model)
for batch in loader:
    loss = protector.backward(batch)      # instead of model(**batch).loss.backward()
    optimizer.step(); optimizer.zero_grad()
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trap2.errors import UserError
from trap2.protecting.batches import part_of
from trap2.protecting.config import Trap2Config
from trap2.protecting.losses import TRAP_LOSSES, Outcome
from trap2.protecting.memory import RowMemory
from trap2.protecting.scaled import LiveUpdate
from trap2.protecting.step import StepRecord, trap_step

Forward = Callable[[nn.Module, Mapping[str, Any]], Outcome]


def default_forward(model: nn.Module, batch: Mapping[str, Any]) -> Outcome:
    """Call a transformers-style model: `model(**batch)` gives `.loss` and maybe `.logits`."""
    output = model(**batch)
    return Outcome(output.loss, getattr(output, "logits", None), batch.get("labels"))


def trap_value(outcome: Outcome, config: Trap2Config, memory: RowMemory, s: float) -> Tensor:
    """The trap loss of a pass at scale s: the chosen loss plus the weighted read-out adversary."""
    value = TRAP_LOSSES.get(config.loss)(outcome)
    if config.readout_weight > 0:
        value = value + config.readout_weight * memory.readout(outcome, s)
    return value


class Protector:
    """Adds the trap to the backward pass of a training loop.

    Args:
        model: The model about to be trained; make the protector before the first step.
        config: Settings of the trap.
        forward: How to run the model on a batch (or on a part of its rows); by default
            `model(**batch)` with a transformers-style output.
        backward: How to back-propagate a loss, for example `accelerator.backward`.
        accumulation_steps: Micro-batches per optimizer step. Each loss is divided by it, and all
            micro-batches of a step see the same scales.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Trap2Config | None = None,
        *,
        forward: Forward = default_forward,
        backward: Callable[[Tensor], Any] = torch.Tensor.backward,
        accumulation_steps: int = 1,
    ) -> None:
        if accumulation_steps < 1:
            raise UserError(f"accumulation_steps={accumulation_steps}; it must be 1 or more")
        self.model = model
        self.config = config if config is not None else Trap2Config()
        self.update = LiveUpdate(model)
        self.memory = RowMemory(self.config.memory)
        self.last: StepRecord | None = None
        self._forward, self._backward = forward, backward
        self._accumulation_steps = accumulation_steps
        self._calls = 0

    def backward(self, batch: Mapping[str, Any]) -> Tensor:
        """Run the nominal and the trap pass on one (micro-)batch; gradients are in `.grad`.

        Args:
            batch: Tensors whose first dimension is the rows.

        Returns:
            The nominal task loss, detached: what a plain run would log.

        Raises:
            TrainingStopped: A loss is NaN or infinite.
        """
        share = 1.0 / self._accumulation_steps

        def nominal() -> Tensor:
            loss = self._forward(self.model, batch).loss
            self._backward(loss * share if share != 1.0 else loss)
            return loss

        def scaled(part: int, s: float, factor: float) -> Tensor:
            rows = part_of(batch, self.config.fraction, part, self.config.scales_per_step)
            value = trap_value(self._forward(self.model, rows), self.config, self.memory, s)
            self._backward(value * (factor * share))
            return value

        step = self._calls // self._accumulation_steps
        self.last = trap_step(nominal, scaled, update=self.update, config=self.config, step=step)
        self._calls += 1
        return torch.tensor(self.last.nominal)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on as an uninterrupted run would."""
        return {"calls": self._calls, "memory": self.memory.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`. Make the protector first, on the base weights."""
        self._calls = int(state["calls"])
        self.memory.load_state_dict(state["memory"])
