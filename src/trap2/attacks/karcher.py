"""Karcher mean: SLERP of any number of updates; the mean direction, at the mean length."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trap2.attacks.angles import angles
from trap2.attacks.attack import attack
from trap2.attacks.ties import COEFFICIENTS
from trap2.attacks.vectors import TaskVector, by_tensor, weighted_sum

STEPS, TINY = 100, 1e-10
"""Most steps taken towards the mean direction, and the angle below which it is reached."""


@attack("karcher", paper="https://doi.org/10.1002/cpa.3160300502", coefficients=COEFFICIENTS)
def karcher(
    updates: Sequence[TaskVector], coefficients: Sequence[float]
) -> Iterator[tuple[str, Tensor]]:
    """Weighted mean on the sphere of directions (Karcher 1977, doi 10.1002/cpa.3160300502).

    Symbols: dW_i update of model i, one tensor; c_i its coefficient; N number of models with
    c_i != 0; u_i direction of c_i dW_i; angle(u, v) the angle between two directions.

        u  = argmin_u sum_i |c_i| angle(u, u_i)^2          |u| = 1
        dW = u * 1/N sum_i |c_i dW_i|

    Of updates and not of whole weights, unlike `slerp`: those of one base are so close that their
    mean on a sphere is their plain mean. A plain mean of updates at wide angles is shorter than any
    of them; this one is not. Updates that cancel out have no mean direction, and dW = 0. One model
    at c = 1 is that model.

    Args:
        updates: One task vector per model.
        coefficients: One coefficient per model.

    Yields:
        (base tensor name, merged update).
    """
    models = max(1, sum(c != 0 for c in coefficients))
    for name, deltas in by_tensor(updates):
        found = angles(updates, name, deltas, coefficients)
        held = torch.tensor([abs(coefficients[place]) for place in found.places]).double()
        mean = mean_direction(found.cosines, held) * found.lengths.sum() / models / found.lengths
        factors = [0.0] * len(deltas)
        for place, value in zip(found.places, mean.tolist(), strict=True):
            factors[place] = value * coefficients[place]
        yield name, weighted_sum(deltas, factors)


def mean_direction(cosines: Tensor, weights: Tensor) -> Tensor:
    """The mean of unit vectors on their sphere, as factors of those vectors.

    It lies in their span, so the angles between them are all it takes. Each step goes along the
    mean of the arcs that lead from the present place to the vectors.

    Args:
        cosines: Of the angles between each two of the vectors.
        weights: A positive weight for each vector.
    """
    weights = weights / weights.sum()
    length = _length(weights, cosines)
    if length < TINY:
        return torch.zeros_like(weights)
    place = weights / length
    for _ in range(STEPS):
        cos = (cosines @ place).clamp(-1, 1)
        angle, sin = cos.acos(), (1 - cos.square()).sqrt()
        pull = weights * torch.where(sin > TINY, angle / sin, 1.0)
        step = pull - torch.dot(pull, cos) * place
        length = _length(step, cosines)
        if length < TINY:
            break
        place = length.cos() * place + length.sin() / length * step
        place = place / _length(place, cosines)
    return place


def _length(factors: Tensor, cosines: Tensor) -> Tensor:
    """Norm of a combination of unit vectors."""
    return torch.dot(factors, cosines @ factors).clamp(min=0).sqrt()
