"""Task arithmetic: add up the updates, each times its coefficient."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from trap2.attacks.attack import attack
from trap2.attacks.vectors import TaskVector, by_tensor, weighted_sum


@attack("task_arithmetic", paper="https://arxiv.org/abs/2212.04089")
def task_arithmetic(
    updates: Sequence[TaskVector], coefficients: Sequence[float]
) -> Iterator[tuple[str, Tensor]]:
    """`dW = sum_i c_i dW_i` (Ilharco et al. 2023, arXiv 2212.04089).

    Symbols: dW_i update of model i; c_i its coefficient. One model at c = 1 is that model.

    Args:
        updates: One task vector per model.
        coefficients: One coefficient per model.

    Yields:
        (base tensor name, merged update).
    """
    for name, deltas in by_tensor(updates):
        yield name, weighted_sum(deltas, coefficients)
