"""Protection for transformers' Trainer and its subclasses, TRL's too: one changed line.

Trainer = protect_trainer(Trainer)
Trainer(model=model, args=args, train_dataset=data, trap2=Trap2Config()).train()
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trap2.errors import Unsupported
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
from trap2.protecting.tokens import shifts_labels, target_count, targets_per_row
from trap2.protecting.wrappers import reducing

GENERATING = (
    *("GRPOTrainer", "RLOOTrainer", "DistillationTrainer"),
    *("OnlineDPOTrainer", "GKDTrainer"),
)
"""Trainers that generate their batches inside `training_step`, which we call twice."""

PAIRED = ("DPOTrainer", "RewardTrainer")
"""Trainers whose batches hold all the chosen rows and then all the rejected ones."""

FUSED = ("SFTTrainer",)
"""Trainers whose loss comes out of a fused head, so that their outputs hold no logits."""

COUNTERS = ("_metrics", "_total_train_tokens")
"""What TRL's trainers add up in every pass for their logs: the trap's passes are not theirs."""


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
                f"{name} generates its batches in training_step, which protection runs twice; "
                "protect the supervised stage that follows instead"
            )
    traits = {
        "_stacked": 2 if any(name in names for name in PAIRED) else 1,
        "_fused": any(name in names for name in FUSED),
        "_plain": _computes_as_trainer(trainer_class),
    }
    return type(f"Protected{trainer_class.__name__}", (_ProtectedMixin, trainer_class), traits)


def _computes_as_trainer(trainer_class: type) -> bool:
    """Whether its `compute_loss` is that of transformers' Trainer."""
    own = next(base for base in trainer_class.__mro__ if "compute_loss" in vars(base))
    return own.__module__ == "transformers.trainer"


class _ProtectedMixin:
    """`training_step` twice: as it is, then scaled with the trap as its loss."""

    state: Any
    model: Any
    args: Any
    accelerator: Any
    current_gradient_accumulation_steps: int
    loss_is_scaled_for_ga: bool | None = None
    is_fsdp_enabled: bool
    is_deepspeed_enabled: bool
    _stacked: int
    _fused: bool
    _plain: bool

    def __init__(self, *args: Any, trap2: Trap2Config | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise Unsupported(
                "the trainer shards the model by itself (FSDP or DeepSpeed) after protection has "
                "taken note of its parameters; use a loop with Protector, made after fully_shard"
            )
        self.trap2 = trap2 if trap2 is not None else Trap2Config()
        self.update = LiveUpdate(self.model, self.trap2.base_files)
        self.objective = TrapObjective(self.trap2)
        self.last: StepRecord | None = None
        self._agreement = Agreement(self.trap2)
        self._keeper = Keeper.of(self.model, self.trap2, self.accelerator.scaler is not None)
        self.surrogates = Surrogates.of(self.trap2, self.update)
        if self.trap2.one_pass and not self._plain:
            raise Unsupported(
                "one_pass=True: the trainer has a way of its own to its loss; leave one_pass off"
            )
        self._joint = Joint(self.model, self.trap2) if self.trap2.one_pass else None
        self._riding: Trap | None = None
        self._shifted = shifts_labels(self.model)
        self._loss_alone = self.objective.reads_the_loss_alone
        self._factor: float | None = None
        self._scale = 1.0
        self._trap: Tensor | None = None
        self._counts_items: bool | None = None
        self._targets = 0
        self._records: list[StepRecord] = []

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        step = super().training_step  # type: ignore[misc]

        def run(rows: dict[str, Any]) -> Tensor:
            loss: Tensor = step(model, rows, *args, **kwargs)
            return loss

        passes = self.trap2.passes_at(self.state.global_step)
        if isinstance(inputs.get("labels"), Tensor):
            self._targets = target_count(inputs, self._shifted)
        targets = targets_per_row(inputs, self._shifted) if passes else 1.0
        fewest = self.trap2.fewest_rows(self.current_gradient_accumulation_steps, targets)
        self._agreement.check(self.state.global_step, self.update.device)
        if passes and self._joint is not None:
            loss = self._in_one(run, self._joint, inputs, fewest)
        else:
            loss = self._one_by_one(run, model, inputs, passes, fewest)
        assert self.last is not None
        nominal, device = self.last.nominal, self.update.device
        self._keeper.easing.note(self.state.global_step, nominal, device)
        self._records.append(self.last)
        return loss

    def _one_by_one(
        self,
        run: Callable[[dict[str, Any]], Tensor],
        model: nn.Module,
        inputs: dict[str, Any],
        passes: int,
        fewest: int,
    ) -> Tensor:
        """The nominal pass, and one for each scale."""
        losses: list[Tensor] = []
        # Before the passes: how long the rows are has to be read from a GPU.
        fraction = 1.0 if self.update.ties_rows else self.trap2.fraction
        parts = [
            part_of(inputs, fraction, p, passes, fewest=fewest, stacked=self._stacked)
            for p in range(passes)
        ]

        def nominal() -> Tensor:
            with reducing(model, now=passes == 0):
                losses.append(run(inputs))
            return losses[0]

        def scaled(part: int, s: float, factor: float) -> Tensor:
            self._factor, self._scale = factor, s
            try:
                with self._counters_kept(), reducing(model, now=part == passes - 1):
                    run(parts[part])
            finally:
                self._factor = None
            assert self._trap is not None
            return self._trap

        self.last = trap_step(
            nominal,
            scaled,
            update=self.update,
            config=self.trap2,
            step=self.state.global_step,
            keeper=self._keeper,
            surrogates=self.surrogates,
        )
        return losses[0]

    def _in_one(
        self,
        run: Callable[[dict[str, Any]], Tensor],
        joint: Joint,
        inputs: dict[str, Any],
        fewest: int,
    ) -> Tensor:
        """The nominal pass, with the rows of the trap in it."""
        losses: list[Tensor] = []
        joint.look(self._loss_of, inputs)

        def together(rows: Mapping[str, Any], trap: Trap) -> Tensor:
            self._riding = trap
            try:
                losses.append(run({**rows}))
            finally:
                self._riding = None
            return losses[0]

        self.last = joint_step(
            together,
            inputs,
            joint=joint,
            objective=self.objective,
            step=self.state.global_step,
            keeper=self._keeper,
            fewest=fewest,
            shifted=self._shifted,
        )
        return losses[0]

    def _loss_of(self, rows: Mapping[str, Any]) -> Tensor:
        """The trainer's own loss of a batch."""
        with self.compute_loss_context_manager():  # type: ignore[attr-defined]
            inputs = self._prepare_inputs({**rows})  # type: ignore[attr-defined]
            loss: Tensor = super().compute_loss(self.model, inputs)  # type: ignore[misc]
        return loss

    @contextmanager
    def _counters_kept(self) -> Iterator[None]:
        """Leave the trainer's own counters as they are now."""
        kept = {n: copy.deepcopy(getattr(self, n)) for n in COUNTERS if hasattr(self, n)}
        try:
            yield
        finally:
            for name, value in kept.items():
                setattr(self, name, value)

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
            riding = self._riding
            both = return_outputs or riding is not None
            result = self._nominal_loss(compute, model, inputs, both, items, kwargs)
            if riding is None:
                return result
            loss, outputs = result
            trap = riding(outputs["logits"], loss) * self._share(items)
            # Its gradient, and not its value: the trainer logs the task's loss.
            loss = loss + torch.where(trap.isfinite(), trap - trap.detach(), 0.0)
            return (loss, outputs) if return_outputs else loss
        # Without a count every loss is a mean over the rows at hand.
        outcome = self._outcome(compute, model, inputs, kwargs)
        value = self.objective(outcome, self._scale)
        self._trap = value.detach()
        self._keeper.guard.see(value)
        scaled_loss = value * (self._factor * self._share(items))
        return (scaled_loss, {"logits": outcome.logits}) if return_outputs else scaled_loss

    def _nominal_loss(
        self,
        compute: Callable[..., Any],
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool,
        items: Any,
        kwargs: dict[str, Any],
    ) -> Any:
        """The trainer's own loss; at first it shows what the trap has to know about it."""
        watched = self._watched(items)
        if self.trap2.strength > 0 and self._counts_items is None and "labels" not in inputs:
            self.objective(Outcome(torch.zeros(())), 1.0)  # fails now, not after the warm-up
        result = compute(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=watched, **kwargs
        )
        if watched is not items:
            loss = result[0] if return_outputs else result
            seen = torch.autograd.grad(loss.sum(), watched, retain_graph=True, allow_unused=True)
            self._counts_items = seen[0] is not None
        return result

    def _outcome(
        self,
        compute: Callable[..., Any],
        model: nn.Module,
        inputs: dict[str, Any],
        kwargs: dict[str, Any],
    ) -> Outcome:
        """What the model gives at the present scale, as far as the trap reads it."""
        if self._loss_alone:
            return Outcome(compute(model, inputs, **kwargs))
        labels = inputs.get("labels")
        if self._fused:
            outputs = model(**inputs, use_cache=False)
            return Outcome(outputs.loss, outputs.logits, labels, self._shifted)
        loss, outputs = compute(model, inputs, return_outputs=True, **kwargs)
        return Outcome(loss, outputs.get("logits"), labels, self._shifted)

    def _watched(self, items: Any) -> Any:
        """The item count, for one training pass as a tensor that tells whether the loss uses it."""
        known = self._counts_items is not None or self.trap2.strength == 0
        if items is None or known or not torch.is_grad_enabled():
            return items
        return torch.as_tensor(items).detach().to(torch.float32, copy=True).requires_grad_()

    def _share(self, items: Any) -> float:
        """What the trap of a micro-batch is multiplied by, to be normalised as its nominal loss is.

        A loss that counts items is a sum over the micro-batch divided by the items of the whole
        optimizer step, so its mean counts by the micro-batch's share of the targets. Where the
        trainer is told that the loss is normalised but gives no count, micro-batches count alike.
        Otherwise the trainer divides by the accumulation steps, or does so for neither: given a
        count, it leaves the division to the model, and most task heads ignore it. Their nominal
        loss stays that many times larger, and so must the trap.
        """
        averaged = items is not None and self.args.average_tokens_across_devices
        processes = float(self.accelerator.num_processes) if averaged else 1.0
        if self._counts_items and items is not None:
            return processes * self._targets / max(1.0, float(items))
        if self.loss_is_scaled_for_ga:
            return 1.0 / self.current_gradient_accumulation_steps
        return 1.0 if self.loss_is_scaled_for_ga is False else processes

    @property
    def dropped(self) -> int:
        """Trap passes dropped since training began, before a resume too: the logs know."""
        logged = sum(entry.get("trap2/dropped", 0) for entry in self.state.log_history)
        return int(logged) + sum(record.dropped for record in self._records)

    def _save_rng_state(self, output_dir: str) -> None:
        """Beside the random streams, keep what the read-out adversary remembers."""
        super()._save_rng_state(output_dir)  # type: ignore[misc]
        kept = {**self.objective.memory.state_dict(), **self._keeper.easing.state_dict()}
        if self.trap2.strength:
            save_file(kept, self._memory_file(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)  # type: ignore[misc]
        if checkpoint is None or not self.trap2.strength:
            return
        file = self._memory_file(checkpoint)
        if not file.is_file():
            warnings.warn(
                f"{file}: not there; what the trap remembers starts empty, so that this run is not "
                "what the uninterrupted one would have been: resume from a protected run's "
                "checkpoint, with as many processes",
                stacklevel=2,
            )
            return
        kept = load_file(file)
        self.objective.memory.load_state_dict(kept)
        self._keeper.easing.load_state_dict(kept)

    def _memory_file(self, checkpoint: str) -> Path:
        return Path(checkpoint) / f"trap2_memory_{self.args.process_index}.safetensors"

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the trap's own numbers to whatever the trainer logs about a step."""
        if "loss" in logs:
            self._log_trap(logs)
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _log_trap(self, logs: dict[str, float]) -> None:
        drawn = [record for record in self._records if record.scales]
        sound = [record.trap for record in drawn if record.trap is not None]
        if sound:
            logs["trap2/trap_loss"] = sum(sound) / len(sound)
        if drawn:
            logs["trap2/scale"] = drawn[-1].scales[-1]
            logs["trap2/strength"] = self.trap2.strength_at(self.state.global_step - 1)
            logs["trap2/eased"] = self._keeper.easing.factor
            logs["trap2/dropped"] = sum(record.dropped for record in drawn)
        pressures = [record.pressure for record in drawn if record.pressure]
        if pressures:
            logs["trap2/kept"] = sum(p.kept for p in pressures) / len(pressures)
            logs["trap2/conflict"] = sum(p.conflict for p in pressures) / len(pressures)
        self._records.clear()
