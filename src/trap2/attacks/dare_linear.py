"""DARE with a sum: drop entries of each update at random, rescale the rest, add up."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from trap2.attacks.attack import attack
from trap2.attacks.dare import dropped
from trap2.attacks.vectors import TaskVector, weighted_sum


@attack(
    "dare_linear",
    paper="https://arxiv.org/abs/2311.03099",
    grid={"drop": (0.5, 0.9), "seed": (0, 1)},
)
def dare_linear(
    updates: Sequence[TaskVector], coefficients: Sequence[float], *, drop: float, seed: int = 0
) -> Iterator[tuple[str, Tensor]]:
    """Drop and rescale, then task arithmetic (Yu et al. 2024, arXiv 2311.03099).

    Symbols: dW_i update of model i; c_i its coefficient; D_i what the drop leaves of it (`dare`).

        dW = sum_i c_i D_i                      E[dW] = sum_i c_i dW_i

    On average it is task arithmetic; what differs is the noise. mergekit rescales to the L1 norm
    before the drop instead of by 1 / (1 - p). One model at c = 1 and drop = 0 is that model.

    Args:
        updates: One task vector per model.
        coefficients: One coefficient per model.
        drop: Chance that an entry is dropped, 0 <= drop < 1.
        seed: Seed of the masks; with it, each (model index, tensor) has its own mask.

    Yields:
        (base tensor name, merged update).

    Raises:
        UserError: The drop is not in [0, 1).
    """
    for name, kept in dropped(updates, drop, seed):
        yield name, weighted_sum(kept, coefficients)
