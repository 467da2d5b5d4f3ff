"""A trap pass reads few rows of an embedding: its gradient need not be as large as the table.

In a small model on a CPU a dense gradient of the whole vocabulary, of which a few hundred rows are
not zero, is a quarter of what the trap pass of full fine-tuning costs.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def sparse_lookups(model: nn.Module) -> Iterator[None]:
    """Embeddings hand over sparse gradients, which are added to the dense ones that are there.

    Only on a CPU, and neither of a compiled model nor in a process group: both rely on the kind of
    gradient that they met first.
    """
    shared = torch.distributed.is_available() and torch.distributed.is_initialized()
    modules = [] if shared else [*model.modules()]
    if any(_is_compiled(module) for module in modules):
        modules = []
    lookups = [m for m in modules if type(m) is nn.Embedding and _adds_up(m)]
    for lookup in lookups:
        lookup.sparse = True
    try:
        yield
    finally:
        for lookup in lookups:
            lookup.sparse = False


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def _adds_up(lookup: nn.Embedding) -> bool:
    """Whether a sparse gradient would be added to a dense one, and would be right."""
    grad = lookup.weight.grad
    plain = not lookup.sparse and not lookup.scale_grad_by_freq
    return plain and grad is not None and not grad.is_sparse and grad.device.type == "cpu"
