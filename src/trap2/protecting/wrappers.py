"""What torch wraps around a model in training: `torch.compile`, DDP and FSDP2 (`fully_shard`).

FSDP2's modules and tensors are told by their methods: to import their classes takes a second, which
whoever shards nothing need not wait for.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from trap2.errors import Unsupported

_KEEPING = {"DeepSpeedEngine": "DeepSpeed", "FullyShardedDataParallel": "FSDP1"}
"""What keeps weights in buffers of its own; told by name, for DeepSpeed need not be installed."""


def check_wrapper(model: nn.Module) -> None:
    """Refuse what would gather or write weights behind the back of the scaled pass.

    Raises:
        Unsupported: DeepSpeed or the older FSDP is at work.
    """
    kinds = {kind.__name__ for module in model.modules() for kind in type(module).__mro__}
    found = [_KEEPING[name] for name in sorted(_KEEPING) if name in kinds]
    if any(hasattr(p, "ds_id") for p in model.parameters()):  # ZeRO-3, before there is an engine
        found.append(_KEEPING["DeepSpeedEngine"])
    if found:
        raise Unsupported(
            f"{found[0]} keeps weights in buffers of its own, where a scale can be lost unseen; "
            "shard with fully_shard (FSDP2), or use DDP: see docs/trainers.md"
        )


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile` and DDP; its parameters are the wrapper's own."""
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


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process may hold only a part of it (a `DTensor`)."""
    return hasattr(tensor, "to_local")


def local(tensor: Any) -> Tensor:
    """The part of a tensor that this process holds, in the same memory: all of it, or a shard."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return part


def together(scalars: Sequence[Tensor]) -> Tensor:
    """Scalars (n,) of any devices on the first one's: reading them waits for a GPU once."""
    return torch.stack([scalar.to(scalars[0].device) for scalar in scalars])


def resharding(model: nn.Module) -> list[Any]:
    """The modules that gather sharded parameters: FSDP2's."""
    return [m for m in model.modules() if hasattr(m, "set_reshard_after_forward")]


def reshard(modules: Iterable[Any]) -> None:
    """Let go of gathered copies of sharded parameters, so that a change of the shards is seen.

    FSDP2 keeps them where a forward pass was not followed by a backward pass.
    """
    for module in modules:
        module.reshard()


def check_reduced(parameters: Iterable[nn.Parameter]) -> None:
    """Refuse sharded parameters whose gradients a backward pass has left unreduced.

    Raises:
        Unsupported: `set_requires_gradient_sync(False)` is on.
    """
    sharded = [p for p in parameters if is_sharded(p)]
    if sharded and all(p.grad is None for p in sharded):
        raise Unsupported(
            "no sharded parameter has a gradient after backward; protection scales reduced "
            "gradients: leave set_requires_gradient_sync at True while accumulating"
        )
