"""The trap may ask for as much as the task does, and never for more: tensor by tensor.

Symbols: g nominal gradient of a tensor; h the trap's gradient of the same tensor; k the cap.

    h  <-  h * min(1, k |g| / |h|)

So no strength has to be tuned: where the trap is far from closed and would drown the task, it is
held to the task's own step; where it has closed it is under the cap. Seen: with a trap on a fifth
of the rows, whose gradient is loud, a task that was lost for hundreds of steps is learned as if
there were no trap.

Each (micro-)batch on each process is judged by itself. Both gradients include whatever a gradient
scaler or an accumulation puts on the losses, so the ratio is free of it.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from trap2.protecting.wrappers import is_sharded


@dataclass(frozen=True)
class Pressure:
    """What the trap asked for in one step, against the task; shares are over tensors.

    Attributes:
        kept: Mean share of its gradient that the cap left: 1 where it was under the cap.
        conflict: Share of tensors whose trap gradient pointed away from what the optimizer step
            had gathered so far, the nominal gradient first of all.
    """

    kept: float
    conflict: float


class Cap:
    """Holds the trap's gradient to a multiple of the nominal one.

    Of a sharded parameter no gradient can be seen on its way, so it is left as it is.

    Args:
        model: The model in training.
        multiple: The largest norm of the trap's gradient of a tensor, in norms of the nominal one;
            0 sets no limit.

    Attributes:
        eased: What the multiple is itself multiplied by (`easing.py`).
    """

    def __init__(self, model: nn.Module, multiple: float) -> None:
        self._parameters, self.multiple, self.eased = [*model.parameters()], multiple, 1.0
        self._squares: dict[int, Tensor] = {}
        self._kept: list[Tensor] = []
        self._opposed: list[Tensor] = []

    @property
    def pressure(self) -> Pressure | None:
        """Of the trap passes since the last nominal one; None where no gradient was held."""
        if not self._kept:
            return None
        first = self._kept[0].device  # reading them all there waits for a GPU once
        seen = [torch.cat([part.to(first) for part in o]) for o in (self._kept, self._opposed)]
        kept, conflict = torch.stack(seen).mean(1).tolist()
        return Pressure(kept, conflict)

    def share(self, own: Tensor, trap: Tensor) -> Tensor:
        """What is left of the trap's gradients; from squared norms of them and of the task's."""
        share = self.eased * self.multiple * (own / trap).sqrt()
        return torch.nan_to_num(share, nan=1.0, posinf=1.0).clamp(max=1.0)

    def judge(
        self, parameter: nn.Parameter, grad: Tensor, square: Tensor, gathered: Tensor | None
    ) -> Tensor | None:
        """What is left of the trap's gradient of a tensor, a share; taken down.

        Args:
            parameter: The tensor.
            grad: The trap's gradient of it.
            square: Its squared norm.
            gathered: What the optimizer step has of the tensor's gradient so far.

        Returns:
            None where the task does not move the tensor: the trap must not either.
        """
        if not self.multiple:
            return torch.ones_like(square)
        own = self._squares.get(id(parameter))
        if own is None:
            return None
        share = self.share(own, square)
        self.note(share.reshape(1), product(gathered, grad).reshape(1))
        return share

    def note(self, shares: Tensor, products: Tensor) -> None:
        """Take down shares of some gradients (n,), and their products with what was there."""
        self._kept.append(shares.float())
        self._opposed.append((products < 0).float())

    def forget(self) -> None:
        """Begin with another nominal pass."""
        self._squares, self._kept, self._opposed = {}, [], []

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Around the nominal pass: take note of its gradients' norms."""
        self.forget()
        with self._hooked(self._note):
            yield

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Around a trap pass, inside everything else that changes its gradients."""
        with self._hooked(self._held):
            yield

    @contextmanager
    def _hooked(self, act: Callable[[nn.Parameter, Tensor], Tensor | None]) -> Iterator[None]:
        with ExitStack() as stack:
            for parameter in self._parameters if self.multiple > 0 else []:
                if parameter.requires_grad and not is_sharded(parameter):
                    hook = parameter.register_hook(partial(act, parameter))  # type: ignore[no-untyped-call]
                    stack.callback(hook.remove)
            yield

    def _note(self, parameter: nn.Parameter, grad: Tensor) -> None:
        # Checkpointed segments may hand over a shared tensor's gradient in parts.
        square, before = squared_norm(grad), self._squares.get(id(parameter))
        self._squares[id(parameter)] = square if before is None else before + square

    def _held(self, parameter: nn.Parameter, grad: Tensor) -> Tensor:
        grad = grad.coalesce() if grad.is_sparse else grad
        share = self.judge(parameter, grad, squared_norm(grad), parameter.grad)
        return torch.zeros_like(grad) if share is None else grad * share.to(grad.dtype)


def product(gathered: Tensor | None, grad: Tensor) -> Tensor:
    """Inner product with what is in `.grad`; 0 where nothing is."""
    if gathered is None:
        return grad.new_zeros(())
    if gathered.is_sparse:
        gathered = gathered.to_dense()
    if grad.is_sparse:  # of an embedding: rows of the table
        gathered, grad = gathered[grad.indices()[0]], grad.values()
    return torch.dot(gathered.flatten(), grad.to(gathered.dtype).flatten())


def squared_norm(grad: Tensor) -> Tensor:
    """Squared norm, in float32 at least: a half would overflow."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    values = grad.coalesce().values() if grad.is_sparse else grad
    norm: Tensor = torch.linalg.vector_norm(values, dtype=wide)
    return norm.square()
