"""Rows of a batch: which of them the trap pass sees, and how long they are."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trap2.errors import UserError
from trap2.protecting.losses import IGNORED


def batch_rows(batch: Mapping[str, Any]) -> int:
    """Number of rows: the first dimension of the batch's first tensor.

    Raises:
        UserError: The batch holds no tensor.
    """
    for value in batch.values():
        if isinstance(value, Tensor) and value.dim() > 0:
            return int(value.shape[0])
    raise UserError(f"the batch holds no tensor, only {list(batch)}; give a dict of tensors")


def places(rows: int, fraction: float, part: int, parts: int, fewest: int) -> Tensor:
    """Which rows of a batch one of `parts` equal shares holds: see `part_of`."""
    used = min(rows, max(fewest, round(fraction * rows)))
    own = range(part % used, used, parts)
    return torch.tensor([(2 * row + 1) * rows // (2 * used) for row in own])


def part_of(
    batch: Mapping[str, Any],
    fraction: float,
    part: int,
    parts: int,
    *,
    fewest: int = 1,
    stacked: int = 1,
) -> dict[str, Any]:
    """One of `parts` equal shares of a `fraction` of a batch's rows, spread over the batch.

    Spread, because loaders order the rows of a batch, for example by length: its first rows are
    then its longest ones, and where length tells of the class, they are of one class. Every share
    has at least one row; with fewer rows than parts, shares have rows in common. Fewer rows than
    the batch has need not be as long as its longest: see `cropped`.

    Args:
        batch: Tensors whose first dimension is the rows; anything else is passed on whole.
        fraction: Share of the rows in use, in (0, 1], to the nearest row.
        part: Which share.
        parts: How many shares.
        fewest: Rows in use if the share would be fewer, as far as the batch has them.
        stacked: 2 if the batch holds pairs, all the chosen rows and then all the rejected ones: a
            share then holds both halves of its pairs.
    """
    rows = batch_rows(batch) // stacked
    middles = places(rows, fraction, part, parts, fewest)

    def taken(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        if value.shape[0] == rows:
            return value[middles]
        if value.shape[0] == stacked * rows:
            return torch.cat([half[middles] for half in value.chunk(stacked)])
        return value

    part_rows = {key: taken(value) for key, value in batch.items()}
    return part_rows if len(middles) == rows else cropped(part_rows)


def cropped(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch of tokens without the columns at its end that are padding in all of its rows.

    The outputs of a model that heeds `attention_mask` stay the same. Everything of the mask's shape
    is cropped with it; nothing is, if labels of that shape count there.

    Args:
        batch: Tensors; without a two-dimensional `attention_mask` it is passed on as it is.
    """
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return {**batch}
    columns = (mask != 0).any(0).nonzero()
    length = int(columns.max()) + 1 if len(columns) else mask.shape[1]
    labels = batch.get("labels")
    if (
        isinstance(labels, Tensor)
        and labels.shape == mask.shape
        and bool((labels[:, length:] != IGNORED).any())
    ):
        return {**batch}
    return {  # contiguous, for models that view their labels as one row
        key: value[:, :length].contiguous()
        if isinstance(value, Tensor) and value.shape == mask.shape
        else value
        for key, value in batch.items()
    }
