"""Rows of a batch: which of them the trap pass sees."""

import math
from collections.abc import Mapping
from typing import Any

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


def part_of(batch: Mapping[str, Any], fraction: float, part: int, parts: int) -> dict[str, Any]:
    """The rows of one of `parts` equal slices of the first `fraction` of a batch.

    Every slice has at least one row; with fewer rows than parts, slices share rows.

    Args:
        batch: Tensors whose first dimension is the rows; anything else is passed on whole.
        fraction: Share of the rows in use, in (0, 1].
        part: Which slice.
        parts: How many slices.
    """
    rows = batch_rows(batch)
    used = max(1, math.ceil(fraction * rows))
    start = min(part * used // parts, used - 1)
    stop = max(start + 1, (part + 1) * used // parts)
    return {
        key: value[start:stop]
        if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == rows
        else value
        for key, value in batch.items()
    }
