"""Running statistics of batch-norm layers, counted anew.

A batch-norm layer normalises by the mean and variance it saw in training. After a merge what goes
into it is something else, and merged statistics need not even be possible: a variance may come out
below zero. So whoever merges such models runs rows through the merge and counts anew, as after
averaging weights (SWA, arXiv 1803.05407) and interpolating them (REPAIR, arXiv 2211.08403). And
where weights still move fast, the statistics of training lag behind them.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Row = TypeVar("Row")

Batches = Sequence[Mapping[str, Tensor]]

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


def recount(model: nn.Module, batches: Batches) -> None:
    """Make running statistics the mean over these batches; without any they stay.

    Only the batch-norm layers run in training mode for that; dropout stays off. Modes are restored.

    Args:
        model: The model with the weights to count for; called with a batch.
        batches: Rows, each batch of two or more.
    """
    layers = normalising(model)
    if not layers or not batches:
        return
    kept = [(module, module.training) for module in model.modules()]
    momenta = [layer.momentum for layer in layers]
    model.eval()
    try:
        _count(model, layers, batches)
    finally:
        for module, training in kept:
            module.training = training
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


@contextmanager
def recomputed(model: nn.Module, batches: Batches) -> Iterator[None]:
    """Inside the `with` block, running statistics are the mean over these batches: see `recount`.

    Afterwards every buffer holds the very bits it held before.
    """
    buffers = [buffer for layer in normalising(model) for buffer in layer.buffers()]
    kept = [buffer.detach().clone() for buffer in buffers]
    try:
        recount(model, batches)
        yield
    finally:
        with torch.no_grad():
            for buffer, before in zip(buffers, kept, strict=True):
                buffer.copy_(before)


@torch.no_grad()
def _count(model: nn.Module, layers: Sequence[_BatchNorm], batches: Batches) -> None:
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # to torch: the plain mean over batches
        layer.training = True
    for batch in batches:
        model(**batch)
