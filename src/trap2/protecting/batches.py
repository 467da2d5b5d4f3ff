"""Rows of a batch: which of them the trap pass sees."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trap2.errors import UserError


def batch_rows(batch: Mapping[str, Any]) -> int:
    """Number of rows: the first dimension of the batch's first tensor.

    Raises:
        UserError: The batch holds no tensor.
    """
    for value in batch.values():
        if isinstance(value, Tensor) and value.dim() > 0:
            return int(value.shape[0])
    raise UserError(f"the batch holds no tensor, only {list(batch)}; give a dict of tensors")


def part_of(
    batch: Mapping[str, Any], fraction: float, part: int, parts: int, *, stacked: int = 1
) -> dict[str, Any]:
    """The rows of one of `parts` equal slices of the first `fraction` of a batch.

    Every slice has at least one row; with fewer rows than parts, slices share rows.

    Args:
        batch: Tensors whose first dimension is the rows; anything else is passed on whole.
        fraction: Share of the rows in use, in (0, 1], to the nearest row and at least one.
        part: Which slice.
        parts: How many slices.
        stacked: 2 if the batch holds pairs, all the chosen rows and then all the rejected ones: a
            slice then holds both halves of its pairs.
    """
    rows = batch_rows(batch) // stacked
    used = max(1, round(fraction * rows))
    start = min(part * used // parts, used - 1)
    stop = max(start + 1, (part + 1) * used // parts)

    def sliced(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        if value.shape[0] == rows:
            return value[start:stop]
        if value.shape[0] == stacked * rows:
            return torch.cat([half[start:stop] for half in value.chunk(stacked)])
        return value

    return {key: sliced(value) for key, value in batch.items()}
