"""TIES: trim each update, elect a sign per entry, average the updates that agree with it."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trap2.attacks.attack import attack
from trap2.attacks.vectors import TaskVector, by_tensor
from trap2.errors import UserError

COEFFICIENTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
"""Wider than for a sum: a mean over the agreeing models leaves each one well below scale 1."""

PIECE = 2**16
"""Entries treated at once, so that the temporary tensors of the election stay in the cache."""


@attack(
    "ties",
    paper="https://arxiv.org/abs/2306.01708",
    grid={"density": (0.1, 0.2, 0.5, 1.0)},
    coefficients=COEFFICIENTS,
)
def ties(
    updates: Sequence[TaskVector], coefficients: Sequence[float], *, density: float
) -> Iterator[tuple[str, Tensor]]:
    """Trim, elect sign, disjoint mean (Yadav et al. 2023, arXiv 2306.01708).

    Symbols: dW_i update of model i; c_i its coefficient; t_i its threshold; T_i trimmed update;
    g elected sign; A set of the models that agree, entry by entry.

        T_i = dW_i where |dW_i| >= t_i, else 0    t_i: smallest of the top `density` of all of dW_i
        g   = sign(sum_i c_i T_i)
        dW  = 1/|A| sum_{i in A} c_i T_i          A = {i : sign(c_i T_i) = g, g != 0}

    The threshold is global, over the tensors the update has, as in the paper; entries that tie
    with it are all kept. Every step is linear in a common factor, so c_i = c gives exactly
    `c * TIES(dW_1, ...)`, the paper's form, and c_i = 0 drops model i. Where the sum is exactly
    zero nobody is elected and dW = 0 (the paper's code takes the model-wide majority there).

    Args:
        updates: One task vector per model.
        coefficients: One coefficient per model.
        density: Share of the entries of each update that is kept, 0 < density <= 1.

    Yields:
        (base tensor name, merged update).

    Raises:
        UserError: The density is not in (0, 1].
    """
    for name, kept in trimmed(updates, density):
        yield name, elect_and_average(kept, coefficients)


def trimmed(updates: Sequence[TaskVector], density: float) -> Iterator[tuple[str, list[Tensor]]]:
    """The trimmed updates T_i, tensor by tensor.

    Args:
        updates: One task vector per model.
        density: Share of the entries of each update that is kept, 0 < density <= 1.

    Yields:
        (base tensor name, [T_1, T_2, ...]).

    Raises:
        UserError: The density is not in (0, 1].
    """
    if not 0 < density <= 1:
        raise UserError(
            f"density={density} keeps no share of an update; use 0 < density <= 1, such as 0.2"
        )
    trim = density < 1
    thresholds = [u.magnitude(density) if trim and len(u) else 0.0 for u in updates]
    for name, deltas in by_tensor(updates):
        if trim:
            pairs = zip(deltas, thresholds, strict=True)
            yield name, [torch.where(delta.abs() >= t, delta, 0.0) for delta, t in pairs]
        else:
            yield name, deltas


def elect_and_average(deltas: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """Elect a sign per entry and average the weighted updates that have it.

    The coefficients are taken relative to the largest one, which is multiplied in at the end: so
    equal coefficients are an exact common factor, rounding included.

    Args:
        deltas: One tensor per model.
        coefficients: One coefficient per model.
    """
    unit = max(coefficients, key=abs)
    if unit == 0:
        return torch.zeros_like(deltas[0])
    weights = [c / unit for c in coefficients]
    pieces = zip(*(torch.split(delta.flatten(), PIECE) for delta in deltas), strict=True)
    merged = torch.cat([_elect_and_average(piece, weights) for piece in pieces])
    return merged.mul_(unit).view(deltas[0].shape)


def _elect_and_average(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    parts = [weight * delta for weight, delta in zip(weights, deltas, strict=True)]
    elected = torch.stack(parts).sum(dim=0).sign_()
    total, agreeing = torch.zeros_like(elected), torch.zeros_like(elected)
    for part in parts:
        agrees = part.sign() == elected
        total += part * agrees
        agreeing += agrees
    return total.div_(agreeing.clamp_(min=1))
