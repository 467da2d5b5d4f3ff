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
from trap2.protecting.agreement import Agreement
from trap2.protecting.batches import part_of
from trap2.protecting.config import Trap2Config
from trap2.protecting.joint import Joint, Trap, joint_step
from trap2.protecting.keeping import Keeper
from trap2.protecting.losses import Outcome
from trap2.protecting.objective import TrapObjective
from trap2.protecting.scaled import LiveUpdate
from trap2.protecting.step import StepRecord, trap_step
from trap2.protecting.surrogates import Surrogates
from trap2.protecting.tokens import shifts_labels, targets_per_row
from trap2.protecting.wrappers import check_reduced, check_wrapper, reducing, unwrapped

Forward = Callable[[nn.Module, Mapping[str, Any]], Outcome]


def default_forward(model: nn.Module, batch: Mapping[str, Any]) -> Outcome:
    """Call a transformers-style model: `model(**batch)` gives `.loss` and maybe `.logits`."""
    output = model(**batch)
    logits = getattr(output, "logits", None)
    return Outcome(output.loss, logits, batch.get("labels"), shifts_labels(model))


class Protector:
    """Adds the trap to the backward pass of a training loop.

    Args:
        model: The model about to be trained; make the protector before the first step, and after
            `fully_shard`. Wrapped in DistributedDataParallel, gradients are reduced once a step.
        config: Settings of the trap.
        forward: How to run the model on a batch (or on a part of its rows); by default
            `model(**batch)` with a transformers-style output.
        backward: How to back-propagate a loss, for example through a gradient scaler.
        accumulation_steps: Micro-batches per optimizer step. Each loss is divided by it, and all
            micro-batches of a step see the same scales.
        accelerator: Accelerate's `Accelerator`, in place of `backward` and `accumulation_steps`:
            it back-propagates, divides, and knows where an optimizer step ends.

    Raises:
        UserError: A setting is out of range or given twice; the model trains nothing.
        Unsupported: The model trains something whose scale is not exact.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Trap2Config | None = None,
        *,
        forward: Forward = default_forward,
        backward: Callable[[Tensor], Any] = torch.Tensor.backward,
        accumulation_steps: int = 1,
        accelerator: Any = None,
    ) -> None:
        if accumulation_steps < 1:
            raise UserError(f"accumulation_steps={accumulation_steps}; it must be 1 or more")
        if accelerator is not None and (
            accumulation_steps != 1 or backward is not torch.Tensor.backward
        ):
            raise UserError(
                "an accelerator back-propagates and divides by its own gradient_accumulation_steps="
                f"{accelerator.gradient_accumulation_steps}; leave out backward and "
                "accumulation_steps"
            )
        check_wrapper(model)
        self.model = model
        self.config = config if config is not None else Trap2Config()
        self.update = LiveUpdate(unwrapped(model), self.config.base_files)
        self.objective = TrapObjective(self.config)
        self.last: StepRecord | None = None
        self._forward = forward
        self._backward = backward if accelerator is None else accelerator.backward
        self._accumulation_steps, self._accelerator = accumulation_steps, accelerator
        self._agreement = Agreement(self.config)
        # A backward of the user's own may scale its losses.
        own = backward is not torch.Tensor.backward
        scaler = getattr(accelerator, "scaler", None)
        has_scaler = own or scaler is not None
        self._keeper = Keeper.of(self.update.model, self.config, has_scaler)
        self._joint = Joint(self.update.model, self.config) if self.config.one_pass else None
        self._surrogates = Surrogates.of(self.config, self.update)
        self._step, self._micro = 0, 0

    def backward(self, batch: Mapping[str, Any], share: float | None = None) -> Tensor:
        """Run the nominal and the trap pass on one (micro-)batch; gradients are in `.grad`.

        Args:
            batch: Tensors whose first dimension is the rows.
            share: What the losses of this micro-batch count in the optimizer step, by default
                1 / accumulation_steps. A mean over all tokens of the step asks for this
                micro-batch's share of its target tokens.

        Returns:
            The nominal task loss, detached: what a plain run would log.

        Raises:
            TrainingStopped: The nominal loss is NaN or infinite, too many trap losses were, or
                processes train at different scales.
        """
        weight = 1.0 / self._accumulation_steps if share is None else share
        passes = self.config.passes_at(self._step)
        micro_batches = getattr(self._accelerator, "gradient_accumulation_steps", None)
        targets = targets_per_row(batch, shifts_labels(self.model)) if passes else 1.0
        fewest = self.config.fewest_rows(micro_batches or self._accumulation_steps, targets)
        self._agreement.check(self._step, self.update.device)
        if passes and self._joint is not None:
            self.last = self._in_one(self._joint, batch, weight, fewest)
        else:
            self.last = self._one_by_one(batch, weight, passes, fewest)
        self._keeper.easing.note(self._step, self.last.nominal, self.update.device)
        self._count()
        return torch.tensor(self.last.nominal)

    def _one_by_one(
        self, batch: Mapping[str, Any], weight: float, passes: int, fewest: int
    ) -> StepRecord:
        """The nominal pass, and one for each scale."""
        # Before the passes: how long the rows are has to be read from a GPU.
        fraction = 1.0 if self.update.ties_rows else self.config.fraction
        parts = [part_of(batch, fraction, part, passes, fewest=fewest) for part in range(passes)]

        def nominal() -> Tensor:
            with reducing(self.model, now=passes == 0):
                loss = self._forward(self.model, batch).loss
                self._backward(loss * weight if weight != 1.0 else loss)
            check_reduced(self.update.parameters)
            return loss

        def scaled(part: int, s: float, factor: float) -> Tensor:
            with reducing(self.model, now=part == passes - 1):
                value = self.objective(self._forward(self.model, parts[part]), s)
                self._keeper.guard.see(value)
                self._backward(value * (factor * weight))
            return value

        return trap_step(
            nominal,
            scaled,
            update=self.update,
            config=self.config,
            step=self._step,
            keeper=self._keeper,
            surrogates=self._surrogates,
        )

    def _in_one(
        self, joint: Joint, batch: Mapping[str, Any], weight: float, fewest: int
    ) -> StepRecord:
        """The nominal pass, with the rows of the trap in it."""
        joint.look(lambda rows: self._forward(self.model, rows).loss, batch)

        def together(rows: Mapping[str, Any], trap: Trap) -> Tensor:
            outcome = self._forward(self.model, rows)
            assert outcome.logits is not None
            loss = outcome.loss + trap(outcome.logits, outcome.loss)
            self._backward(loss * weight if weight != 1.0 else loss)
            return outcome.loss

        return joint_step(
            together,
            batch,
            joint=joint,
            objective=self.objective,
            step=self._step,
            keeper=self._keeper,
            fewest=fewest,
            shifted=shifts_labels(self.model),
        )

    @property
    def dropped(self) -> int:
        """How many trap passes were not finite and left no gradient."""
        return self._keeper.guard.dropped

    def _count(self) -> None:
        """Count this micro-batch, and the optimizer step if it ends here."""
        self._micro += 1
        if self._accelerator is None:
            ended = self._micro == self._accumulation_steps
        else:
            ended = bool(self._accelerator.sync_gradients)
        if ended:
            self._step, self._micro = self._step + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on as an uninterrupted run would."""
        return {
            "step": self._step,
            "micro": self._micro,
            "memory": self.objective.memory.state_dict(),
            "easing": self._keeper.easing.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`. Make the protector first, on the base weights."""
        self._step, self._micro = int(state["step"]), int(state["micro"])
        self.objective.memory.load_state_dict(state["memory"])
        self._keeper.easing.load_state_dict(state["easing"])
