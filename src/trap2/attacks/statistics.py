"""New running statistics for the batch-norm layers of a merge.

A batch-norm layer normalises by the mean and variance it saw in training. After a merge what goes
into it is something else, and merged statistics need not even be possible: a variance may come out
below zero. So whoever merges such models runs rows through the merge and counts anew, as after
averaging weights (SWA, arXiv 1803.05407) and interpolating them (REPAIR, arXiv 2211.08403).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Row = TypeVar("Row")

BATCH = 64
"""Rows per forward pass, at most."""


def normalising(model: nn.Module) -> list[_BatchNorm]:
    """The layers of a model that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


def mixed(tasks: Sequence[Sequence[Row]]) -> list[list[Row]]:
    """Rows of several tasks in batches of about equal size, each with rows of every task.

    Statistics of one task a batch would leave out how the tasks differ.

    Args:
        tasks: Each task's rows; none is None.
    """
    rows = [row for turn in zip_longest(*tasks) for row in turn if row is not None]
    count = -(-len(rows) // BATCH)
    return [rows[i * len(rows) // count : (i + 1) * len(rows) // count] for i in range(count)]


@contextmanager
def recomputed(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> Iterator[None]:
    """Inside the `with` block, running statistics are the mean over these batches.

    Only the batch-norm layers run in training mode for that; dropout stays off. Afterwards every
    buffer holds the very bits it held before.

    Args:
        model: The model, holding the merge; called with a batch.
        batches: Rows, each batch of two or more.
    """
    layers = normalising(model)
    kept = [
        (layer.momentum, layer.training, [b.detach().clone() for b in layer.buffers()])
        for layer in layers
    ]
    try:
        _count(model, layers, batches)
        yield
    finally:
        with torch.no_grad():
            for layer, (momentum, training, buffers) in zip(layers, kept, strict=True):
                layer.momentum = momentum
                layer.train(training)
                for buffer, before in zip(layer.buffers(), buffers, strict=True):
                    buffer.copy_(before)


@torch.no_grad()
def _count(
    model: nn.Module, layers: Sequence[_BatchNorm], batches: Iterable[Mapping[str, Tensor]]
) -> None:
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # to torch: the plain mean over batches
        layer.train()
    for batch in batches:
        model(**batch)
    for layer in layers:
        layer.eval()
