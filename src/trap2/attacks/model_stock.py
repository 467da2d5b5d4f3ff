"""Model Stock: stay the closer to the base, the less the models' updates agree."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trap2.attacks.angles import angles
from trap2.attacks.attack import attack
from trap2.attacks.vectors import TaskVector, by_tensor, weighted_sum

COEFFICIENTS = (0.0, 0.5, 1.0, 1.5, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Far wider than for a sum: updates of different tasks are near right angles, so t is small."""


@attack("model_stock", paper="https://arxiv.org/abs/2403.19522", coefficients=COEFFICIENTS)
def model_stock(
    updates: Sequence[TaskVector], coefficients: Sequence[float]
) -> Iterator[tuple[str, Tensor]]:
    """Interpolate between base and mean, tensor by tensor (Jang et al. 2024, arXiv 2403.19522).

    Symbols: dW_i update of model i; c_i its coefficient; N number of models for which c_i dW_i is
    not zero in the tensor; a mean cosine of the angles between those, taken two at a time.

        t  = N a / (1 + (N - 1) a)             t = 0 where a <= 0, t = 1 where N = 1
        dW = t * 1/N sum_i c_i dW_i

    The angle does not see how long an update is, so equal coefficients are a common factor. The
    paper knows only a > 0; below, its t would turn the mean around and has a pole. A model that
    leaves a tensor as it is has no angle there and is left out of it. One model at c = 1 is that
    model.

    Args:
        updates: One task vector per model.
        coefficients: One coefficient per model.

    Yields:
        (base tensor name, merged update).
    """
    for name, deltas in by_tensor(updates):
        found = angles(updates, name, deltas, coefficients)
        factor = ratio(found.cosines) / max(1, len(found.places))
        yield name, weighted_sum(deltas, [factor * c for c in coefficients])


def ratio(cosines: Tensor) -> float:
    """How far on the way from the base to the mean the merge lies, the t above.

    Args:
        cosines: N x N cosines of the angles between the updates.
    """
    count = len(cosines)
    if count < 2:
        return 1.0
    above = torch.triu_indices(count, count, 1)
    a = float(cosines[above[0], above[1]].mean())
    return count * a / (1 + (count - 1) * a) if a > 0 else 0.0
