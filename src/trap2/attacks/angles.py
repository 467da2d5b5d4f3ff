"""Lengths of updates and angles between them, tensor by tensor, for the attacks that go by those.

Symbols: dW_i update of model i, one tensor, flattened; c_i its coefficient.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trap2.attacks.vectors import TaskVector

PIECE = 2**16
"""Entries treated at once, so that no float64 copy of all updates is ever held."""


@dataclass(frozen=True)
class Angles:
    """The updates `c_i dW_i` of one tensor that are not zero: those have a direction.

    Attributes:
        places: Which of the models they are of.
        lengths: Their Euclidean norms.
        cosines: Of the angles between each two of them.
    """

    places: list[int]
    lengths: Tensor
    cosines: Tensor


def angles(
    updates: Sequence[TaskVector],
    name: str,
    deltas: Sequence[Tensor],
    coefficients: Sequence[float],
) -> Angles:
    """Lengths of and angles between the updates `c_i dW_i` of one tensor, in float64.

    Args:
        updates: One task vector per model.
        name: The tensor's name.
        deltas: Each model's update of it.
        coefficients: One coefficient per model.
    """
    key = ("products", name, *(update.serial for update in updates))
    factors = torch.tensor(coefficients, dtype=torch.float64)
    products = updates[0].remember(key, lambda: _products(deltas)) * torch.outer(factors, factors)
    places = [index for index, square in enumerate(products.diagonal()) if square > 0]
    found = products[places][:, places]
    lengths = found.diagonal().sqrt()
    return Angles(places, lengths, (found / torch.outer(lengths, lengths)).clamp(-1, 1))


def _products(deltas: Sequence[Tensor]) -> Tensor:
    """The inner products of each two updates of one tensor."""
    total = torch.zeros(len(deltas), len(deltas), dtype=torch.float64)
    for piece in zip(*(torch.split(delta.flatten(), PIECE) for delta in deltas), strict=True):
        stacked = torch.stack(piece).double()
        total += (stacked @ stacked.T).cpu()
    return total
