"""Equal norms: rescale every update to the updates' mean norm before they are added up."""

import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from trap2.attacks.attack import attack
from trap2.attacks.vectors import TaskVector, by_tensor, weighted_sum


@attack("equal_norms", paper="https://arxiv.org/abs/2508.01148")
def equal_norms(
    updates: Sequence[TaskVector], coefficients: Sequence[float]
) -> Iterator[tuple[str, Tensor]]:
    """Task arithmetic of updates of one norm, the first step of DisTaC (arXiv 2508.01148).

    Symbols: dW_i update of model i; c_i its coefficient; n_i Frobenius norm of the whole of dW_i; n
    mean of n_i over the models with c_i != 0 whose update is not zero.

        dW = sum_i c_i n / n_i dW_i

    A release may hide behind a small or a large update, which one shared coefficient then cannot
    suit. The paper goes on to distil; here nothing is learned. One model at c = 1 is that model.

    Args:
        updates: One task vector per model.
        coefficients: One coefficient per model.

    Yields:
        (base tensor name, merged update).
    """
    norms = [norm(update) for update in updates]
    taking_part = [n for n, c in zip(norms, coefficients, strict=True) if c != 0 and n > 0]
    mean = math.fsum(taking_part) / max(1, len(taking_part))
    factors = [c * mean / n if n else 0.0 for n, c in zip(norms, coefficients, strict=True)]
    for name, deltas in by_tensor(updates):
        yield name, weighted_sum(deltas, factors)


def norm(update: TaskVector) -> float:
    """Frobenius norm of a whole update, remembered."""

    def work() -> float:
        return math.sqrt(math.fsum(float(update[name].double().square().sum()) for name in update))

    return update.remember(("norm",), work)
