"""What becomes of a trap that is not finite: it is dropped, and too many of them stop training.

At scales the task was never trained at, a loss or a gradient can overflow where the nominal one
does not. The nominal step is sound then and goes on alone.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch import distributed as dist

from trap2.errors import TrainingStopped
from trap2.protecting.wrappers import is_sharded, local, processes, together

RECENT = 50
"""Trap passes that are looked back on."""

TOLERATED = 5
"""Dropped ones among them that training goes on with: 10 %."""


class Guard:
    """Drops trap gradients that are not finite, tensor by tensor, and counts the passes.

    Args:
        model: The model in training.
        has_scaler: Whether a gradient scaler is at work: overflowing gradients are its signal to
            skip the step and scale less, and are left to it.

    Attributes:
        sound: Whether the last pass was finite.
        dropped: How many passes were not.
    """

    def __init__(self, model: nn.Module, has_scaler: bool) -> None:
        self._parameters, self._has_scaler = [*model.parameters()], has_scaler
        self._recent: deque[bool] = deque(maxlen=RECENT)
        self._broken: list[Tensor] = []
        self.sound, self.dropped = True, 0

    def see(self, loss: Tensor) -> None:
        """Note a trap loss before its backward pass."""
        self._broken = [~loss.detach().isfinite().all()]

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Around one trap pass, which must call `see`.

        Raises:
            TrainingStopped: Too many passes have been dropped; or one with sharded parameters,
                whose gradients cannot be held back.
        """
        with ExitStack() as stack:
            for parameter in self._parameters:
                if parameter.requires_grad and not is_sharded(parameter):
                    handle = parameter.register_hook(self._held_back)  # type: ignore[no-untyped-call]
                    stack.callback(handle.remove)
            yield
        self.settle()

    def fit(self, squares: Tensor) -> Tensor:
        """Which gradients of a pass may be added, by their squared norms (n,); then `settle`."""
        sound = torch.ones_like(squares) if self._has_scaler else squares
        fit = sound.isfinite() & ~self._broken[0].to(squares.device)
        self._broken.append(~fit.all())
        return fit

    def settle(self) -> None:
        """Count a pass that has ended.

        Raises:
            TrainingStopped: See `watch`.
        """
        shards = [p.grad for p in self._parameters if is_sharded(p) and p.grad is not None]
        if shards:
            self._broken.append(self._broken_anywhere(shards))
        self.sound = not bool(together(self._broken).any())
        self._recent.append(not self.sound)
        self.dropped += not self.sound
        if not self.sound and any(map(is_sharded, self._parameters)):
            raise TrainingStopped(
                "the trap's loss or gradient is not finite and gradients of sharded parameters "
                "cannot be held back; training stopped before the weights took it: lower the "
                "learning rate or the strength"
            )
        if sum(self._recent) > TOLERATED:
            raise TrainingStopped(
                f"{sum(self._recent)} of the last {len(self._recent)} trap passes were not finite "
                f"(at most {TOLERATED} of {RECENT} are dropped); training stopped: lower the "
                "learning rate, the strength or `high`, or compute in bfloat16 or float32"
            )

    def _broken_anywhere(self, shards: list[Tensor]) -> Tensor:
        """Whether a pass has broken in any process: no hook has seen gradients of shards coming."""
        sums = [local(shard).sum(dtype=torch.float32) for shard in shards]
        sound = self._broken[0].logical_not().to(sums[0].device)
        if not self._has_scaler:
            sound = sound & together(sums).isfinite().all()
        broken = sound.logical_not().to(torch.uint8)
        if processes() > 1:  # all of them stop, or none
            dist.all_reduce(broken, dist.ReduceOp.MAX)
        return broken.bool()

    def _held_back(self, grad: Tensor) -> Tensor | None:
        broken = self._broken[0]
        if not self._has_scaler:
            # One pass without a copy: a sum is finite where its terms are, up to absurd sizes.
            wide = torch.promote_types(grad.dtype, torch.float32)
            broken = broken | ~grad.sum(dtype=wide).isfinite()
            self._broken.append(broken)
        if grad.device.type == "cpu":  # nothing to wait for: no copy of what is sound
            return torch.zeros_like(grad) if broken else None
        return torch.where(broken.to(grad.device), torch.zeros_like(grad), grad)
