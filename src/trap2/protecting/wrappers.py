"""What torch wraps around a model in training: `torch.compile` and DistributedDataParallel."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside; its parameters are the wrapper's own."""
    inner: Any = model
    while True:
        if isinstance(inner, DistributedDataParallel):
            inner = inner.module
        elif hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        else:
            return inner  # type: ignore[no-any-return]


def reducing(model: nn.Module, now: bool) -> AbstractContextManager[Any]:
    """DDP reduces gradients over processes in the passes run inside only if it is `now`.

    A protected step has several backward passes and needs one reduction: in the last of them.
    """
    if now or not isinstance(model, DistributedDataParallel):
        return nullcontext()
    return model.no_sync()
