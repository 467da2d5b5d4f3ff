"""Rows of an adapter's trap in the nominal pass: every row sees the update at a scale of its own.

Symbols: A, B the factors of a LoRA layer; x its input; s the scale of a row.

    rows of the batch:  B (A x)         rows of the trap, behind them:  s * B' (A' x)

A' and B' are A and B in the same memory with gradients of their own, so that cap and guard see the
trap's apart. A pass over a few rows takes as many kernels as one over all, and unless its batch is
large a step on a GPU waits for their launch; here they are launched once. It takes a model whose
rows do not see each other, trained tensors that are plain LoRA's, and a loss that leaves out rows
without labels; anything else is refused. Dropout draws for more rows than in a plain run, and
activations are those of more rows. By default every scale gets a pass of its own (`step.py`).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from trap2.errors import Unsupported
from trap2.protecting.batches import batch_rows, places
from trap2.protecting.config import Trap2Config
from trap2.protecting.keeping import Keeper
from trap2.protecting.losses import IGNORED, Outcome
from trap2.protecting.objective import TrapObjective
from trap2.protecting.step import StepRecord, finite
from trap2.protecting.tuners import LORA_A, LORA_B
from trap2.protecting.wrappers import is_sharded, processes

READ_LOGITS = ("decoy", "unlikelihood", "readout")
"""Trap losses of the logits alone: a row's own loss is not at hand here."""

CLOSE = 5e-3
"""Relative difference of a loss in half precision that comes from the size of a batch."""


Trap = Callable[[Tensor, Tensor], Tensor]
"""From the logits of all rows and the nominal loss, what the trap adds to that."""


@dataclass(frozen=True)
class Riders:
    """Rows of one trap pass: where they are in the batch, and the scale they see."""

    rows: Tensor
    s: float


class Joint:
    """The layers of a plain LoRA adapter, whose rows can be of two kinds.

    Args:
        model: A model in training.
        config: Settings of the trap.

    Raises:
        Unsupported: The rows of this trap cannot ride along in this model.
    """

    def __init__(self, model: nn.Module, config: Trap2Config) -> None:
        reason = _obstacle(model, config)
        if reason is not None:
            raise Unsupported(f"one_pass=True: {reason}; leave one_pass off")
        linears = [(name, module) for name, module in _linears(model)]
        self._first = [module for name, module in linears if LORA_A[0] in name]
        self._second = [module for name, module in linears if LORA_B[0] in name]
        self._model, self._seen = model, False

    @property
    def weights(self) -> list[Tensor]:
        """What is trained."""
        return [linear.weight for linear in (*self._first, *self._second)]

    def look(self, loss: Callable[[Mapping[str, Any]], Tensor], batch: Mapping[str, Any]) -> None:
        """Make sure, once, that riders leave the nominal loss as it is.

        Args:
            loss: The nominal loss of a batch; it is asked with the model in evaluation mode.
            batch: One.

        Raises:
            Unsupported: They do not.
        """
        if processes() > 1:
            raise Unsupported(
                f"one_pass=True: it is for one process, and there are {processes()}; leave it off"
            )
        if self._seen:
            return
        riders = [Riders(torch.zeros(1, dtype=torch.long), 0.5)]
        training = [module for module in self._model.modules() if module.training]
        try:
            for module in training:
                module.training = False
            with torch.no_grad():
                alone = float(loss(batch))
                with self.riding(batch, riders) as (together, _):
                    beside = float(loss(together))
        finally:
            for module in training:
                module.training = True
        if not math.isclose(alone, beside, rel_tol=CLOSE):
            raise Unsupported(
                f"one_pass=True: the loss of a batch is {alone:.6g}, and with a row without labels "
                f"behind it {beside:.6g}, so its rows are not by themselves; leave one_pass off"
            )
        self._seen = True

    @contextmanager
    def riding(
        self, batch: Mapping[str, Any], riders: Sequence[Riders]
    ) -> Iterator[tuple[dict[str, Any], list[Tensor]]]:
        """Run forward and backward inside.

        Yields:
            The batch with its riders behind it, without labels; and A', B' of all layers in the
            order of `weights`, which will have the gradients of the riders.
        """
        first = batch_rows(batch)
        counts = torch.tensor([len(one.rows) for one in riders])
        scales = torch.tensor([one.s for one in riders]).repeat_interleave(counts)
        scales = scales.to(self.weights[0].device)
        twins = [weight.detach().requires_grad_() for weight in self.weights]
        layers = [*self._first, *self._second]
        with ExitStack() as stack:
            for place, (linear, twin) in enumerate(zip(layers, twins, strict=True)):
                seen = scales if place >= len(self._first) else None
                linear.forward = _split(linear.weight, twin, first, seen, len(scales))  # type: ignore[method-assign, assignment]
                stack.callback(delattr, linear, "forward")
            yield joined(batch, riders), twins


def _split(
    weight: Tensor, twin: Tensor, first: int, scales: Tensor | None, count: int
) -> Callable[[Tensor], Tensor]:
    """The forward of a factor for rows of the batch and riders behind them."""

    def forward(x: Tensor) -> Tensor:
        if x.shape[0] != first + count:
            raise Unsupported(
                f"one_pass=True: a layer gets {tuple(x.shape)} where the first dimension should be "
                f"the {first + count} rows; leave one_pass off"
            )
        riders = F.linear(x[first:], twin)
        if scales is not None:
            riders = riders * scales.to(riders.dtype).view(-1, *[1] * (x.dim() - 1))
        return torch.cat([F.linear(x[:first], weight), riders])

    return forward


def joined(batch: Mapping[str, Any], riders: Sequence[Riders]) -> dict[str, Any]:
    """A batch with its riders behind it; their labels do not count in the loss."""
    rows, where = batch_rows(batch), torch.cat([one.rows for one in riders])

    def more(key: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != rows:
            return value
        behind = value[where.to(value.device)]
        return torch.cat([value, torch.full_like(behind, IGNORED) if key == "labels" else behind])

    return {key: more(key, value) for key, value in batch.items()}


def joint_step(
    run: Callable[[Mapping[str, Any], Trap], Tensor],
    batch: Mapping[str, Any],
    *,
    joint: Joint,
    objective: TrapObjective,
    step: int,
    keeper: Keeper,
    fewest: int,
    shifted: bool,
) -> StepRecord:
    """`trap_step` in one pass: the gradients are left in `.grad`.

    Args:
        run: `run(together, trap)` runs forward and backward of the joined batch and returns the
            nominal loss; `trap(logits, loss)` is what it has to add to that.
        batch: Of the nominal pass.
        joint: The layers.
        objective: The trap.
        step: Index of the optimizer step; the trap is at work in it.
        keeper: Lets the trap's gradients into `.grad`.
        fewest: Rows of the trap at least.
        shifted: See `Outcome`.

    Raises:
        TrainingStopped: The nominal loss is NaN or infinite, or too many traps were.
    """
    config = objective.config
    strength, law = keeper.easing.factor * config.strength_at(step), config.law_at(step)
    scales = law.draw(config.scale_seed, step, config.scales_per_step)
    riders = riders_of(batch, config.fraction, scales, fewest)
    traps: list[Tensor] = []

    def trap(logits: Tensor, loss: Tensor) -> Tensor:
        for outcome, one in zip(
            _outcomes(logits, batch, riders, shifted, loss), riders, strict=True
        ):
            traps.append(objective(outcome, one.s))
        keeper.guard.see(torch.stack(traps))
        weights = [strength * law.weight(one.s) / len(riders) for one in riders]
        return torch.stack([w * t for w, t in zip(weights, traps, strict=True)]).sum()

    with keeper.listening(), joint.riding(batch, riders) as (together, twins):
        loss = run(together, trap)
    found = finite(loss, "nominal loss", step)
    keeper.judge([*zip(joint.weights, (twin.grad for twin in twins), strict=True)])
    sound = keeper.guard.sound
    mean = float(torch.stack(traps).mean().detach()) if sound else None
    dropped = 0 if sound else len(traps)
    return StepRecord(found, mean, tuple(scales), dropped, keeper.cap.pressure)


def _outcomes(
    logits: Tensor, batch: Mapping[str, Any], riders: Sequence[Riders], shifted: bool, loss: Tensor
) -> Iterator[Outcome]:
    """What the model gave for each group of riders; it has no loss of its own."""
    at = batch_rows(batch)
    for one in riders:
        labels = batch["labels"]
        own = labels[one.rows.to(labels.device)].to(logits.device)
        yield Outcome(loss, logits[at : at + len(one.rows)], own, shifted)
        at += len(one.rows)


def riders_of(
    batch: Mapping[str, Any], fraction: float, scales: Sequence[float], fewest: int
) -> list[Riders]:
    """One group of rows for each scale, as `part_of` takes them."""
    rows, parts = batch_rows(batch), len(scales)
    return [Riders(places(rows, fraction, p, parts, fewest), s) for p, s in enumerate(scales)]


def _linears(model: nn.Module) -> Iterator[tuple[list[str], nn.Linear]]:
    """The factors of a LoRA adapter that are trained and plain layers, with their names."""
    for name, module in model.named_modules():
        parts = name.split(".")
        if (
            (LORA_A[0] in parts or LORA_B[0] in parts)
            and type(module) is nn.Linear
            and module.weight.requires_grad
            and module.bias is None
            and "forward" not in vars(module)  # what another library has put in its place
            and not is_sharded(module.weight)
        ):
            yield parts, module


def _obstacle(model: nn.Module, config: Trap2Config) -> str | None:
    """Why rows of this trap cannot ride along in this model."""
    plain = {id(module.weight) for _, module in _linears(model)}
    others = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in plain]
    if others:
        return f"it needs a plain LoRA adapter of linear layers alone, and '{others[0]}' is trained"
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        return "in batch norm the rows see each other"
    if config.loss not in READ_LOGITS:
        return f"loss={config.loss} is made of each row's own loss, which one pass does not give"
    if config.surrogates:
        return "surrogates change the weights of all rows"
    return None
