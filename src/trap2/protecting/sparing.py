"""Full fine-tuning's trap trains the upper tensors; those next to the input are the task's alone.

A trap in every layer can cost the task more than it hides. Left out of the trap pass, the lower
tensors learn the task undisturbed. At scale s they are scaled like all others, and autograd ends
where the trained tensors end: the pass is cheaper by what lies below. An adapter's trap needs all
of its layers: it spares none.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch import distributed as dist

from trap2.protecting.wrappers import is_sharded


@contextmanager
def sparing(tensors: Sequence[nn.Parameter]) -> Iterator[None]:
    """Around a trap pass, forward and backward: these tensors get no gradient of it.

    What reduces gradients over processes waits for every tensor; there they get zeros, or what
    they got is dropped, and nothing is saved.
    """
    with ExitStack() as stack:
        for tensor in tensors:
            if is_sharded(tensor):  # hooks do not run
                stack.callback(setattr, tensor, "grad", tensor.grad)
                tensor.grad = None
            elif dist.is_available() and dist.is_initialized():
                hook = tensor.register_hook(_nothing)  # type: ignore[no-untyped-call]
                stack.callback(hook.remove)
            else:
                tensor.requires_grad_(False)
                stack.callback(tensor.requires_grad_, True)
        yield


def _nothing(grad: Tensor) -> Tensor:
    return torch.zeros_like(grad)
