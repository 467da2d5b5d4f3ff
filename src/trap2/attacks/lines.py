"""LiNeS: scale the sum of the updates layer by layer, along a line from the first to the last."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from trap2.attacks.attack import attack
from trap2.attacks.depth import depths
from trap2.attacks.vectors import TaskVector, by_tensor, weighted_sum


@attack("lines", paper="https://arxiv.org/abs/2410.17146", grid={"first": (0.3, 0.6, 1.5)})
def lines(
    updates: Sequence[TaskVector], coefficients: Sequence[float], *, first: float
) -> Iterator[tuple[str, Tensor]]:
    """Layer-increasing scaling of task arithmetic (Wang et al. 2025, arXiv 2410.17146).

    Symbols: dW_i update of model i; c_i its coefficient; d depth of the tensor's layer, 0 for the
    first layer and 1 for the last.

        f(d) = first + (1 - first) d
        dW   = f(d) * sum_i c_i dW_i

    The paper's alpha and beta are c * first and c * (1 - first). Tensors of no layer, such as
    embeddings, are scaled as the first one. A `first` above 1 shrinks the deep layers instead. One
    model at c = 1 and first = 1 is that model.

    Args:
        updates: One task vector per model.
        coefficients: One coefficient per model.
        first: Factor of the first layer; that of the last is 1.

    Yields:
        (base tensor name, merged update).
    """
    places = depths(name for update in updates for name in update)
    for name, deltas in by_tensor(updates):
        factor = first + (1 - first) * (places[name] or 0.0)
        yield name, weighted_sum(deltas, [factor * c for c in coefficients])
