"""Routing: one merged update is stored, and a mask per model that makes it that model's again.

No merging in the sense of the tiers: every model is used by itself, near its own scale 1, and what
is saved is storage. No protection in the weights can claim to stop that, so these are in no tier
and an audit reports them apart (`auditing/routing.py`).

Symbols: dW_i update of model i; c_i its coefficient, 1 everywhere where models are routed; o the
model that is asked for, the first one; x entry by entry.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trap2.attacks.attack import ROUTING, attack
from trap2.attacks.vectors import TaskVector, by_tensor, weighted_sum


@attack("emr", paper="https://arxiv.org/abs/2405.17461", tiers=(ROUTING,), coefficients=(1.0,))
def emr(
    updates: Sequence[TaskVector], coefficients: Sequence[float]
) -> Iterator[tuple[str, Tensor]]:
    """Elect, mask and rescale (EMR-Merging, Huang et al. 2024, arXiv 2405.17461): the first model.

        g = sign(sum_i c_i dW_i)
        E = g x max_i |c_i dW_i|    over the models with sign(c_i dW_i) = g
        M = 1 where c_o dW_o x E > 0, else 0
        l = sum |c_o dW_o| / sum |M x E|    over all tensors of the model asked for
        dW = l M x E

    One model at c = 1 is that model.

    Args:
        updates: One task vector per model, the one asked for first.
        coefficients: One coefficient per model.

    Yields:
        (base tensor name, update of the model asked for).
    """
    own, masked = [], []
    for _, deltas in by_tensor(updates):
        mine, kept = _elected(deltas, coefficients)
        own.append(float(mine.abs().sum(dtype=torch.float64)))
        masked.append(float(kept.abs().sum(dtype=torch.float64)))
    factor = math.fsum(own) / (math.fsum(masked) or 1.0)
    for name, deltas in by_tensor(updates):  # worked out again: whole models are not held
        yield name, factor * _elected(deltas, coefficients)[1]


def _elected(deltas: Sequence[Tensor], coefficients: Sequence[float]) -> tuple[Tensor, Tensor]:
    """c_o dW_o and M x E of one tensor."""
    parts = [c * delta for c, delta in zip(coefficients, deltas, strict=True)]
    sign = weighted_sum(deltas, coefficients).sign()
    largest = torch.zeros_like(parts[0])
    for part in parts:
        largest = torch.maximum(largest, (part * sign).clamp_(min=0))
    return parts[0], sign * largest * (parts[0] * sign > 0)


@attack(
    "tall_masks",
    paper="https://arxiv.org/abs/2405.07813",
    tiers=(ROUTING,),
    grid={"strictness": (0.2, 0.3, 0.4, 0.5, 0.6)},
    coefficients=(1.0,),
)
def tall_masks(
    updates: Sequence[TaskVector], coefficients: Sequence[float], *, strictness: float
) -> Iterator[tuple[str, Tensor]]:
    """The sum under one model's TALL mask (Wang et al. 2024, arXiv 2405.07813): the first model.

        S  = sum_i c_i dW_i
        dW = S where |c_o dW_o| > strictness * |S - c_o dW_o|, else 0

    `consensus` merges with these masks; here the mask of one model gives that model back. One model
    at c = 1 is that model. `strictness` is the paper's lambda.

    Args:
        updates: One task vector per model, the one asked for first.
        coefficients: One coefficient per model.
        strictness: How much larger than what the other models add an entry must be.

    Yields:
        (base tensor name, update of the model asked for).
    """
    for name, deltas in by_tensor(updates):
        total = weighted_sum(deltas, coefficients)
        own = coefficients[0] * deltas[0]
        yield name, total * (own.abs() > strictness * (total - own).abs())
