"""Task arithmetic with a coefficient of its own for each model in each part of the depth."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from trap2.attacks.attack import attack
from trap2.attacks.depth import depths
from trap2.attacks.vectors import TaskVector, by_tensor, weighted_sum

PAPER = "https://arxiv.org/abs/2310.02575"


@attack("depth_thirds", paper=PAPER, tiers=("T3",), parts=3)
def depth_thirds(
    updates: Sequence[TaskVector], coefficients: Sequence[float]
) -> Iterator[tuple[str, Tensor]]:
    """Layer-wise coefficients (Yang et al. 2024, arXiv 2310.02575), by thirds of the layers.

    Symbols: dW_i update of model i; d depth of the tensor's layer, 0 for the first layer and 1 for
    the last; G parts of the depth; c_ig coefficient of model i in part g.

        g(d) = min(floor(G d), G - 1)
        dW   = sum_i c_ig(d) dW_i

    AdaMerging learns its coefficients from unlabelled rows; here they are searched for. Tensors of
    no layer, such as embeddings, are in the first part. Equal coefficients make it task arithmetic.

    Args:
        updates: One task vector per model.
        coefficients: c_11, ..., c_1G, c_21, ...

    Yields:
        (base tensor name, merged update).
    """
    yield from _by_parts(updates, coefficients)


@attack("depth_sixths", paper=PAPER, tiers=("T3",), parts=6)
def depth_sixths(
    updates: Sequence[TaskVector], coefficients: Sequence[float]
) -> Iterator[tuple[str, Tensor]]:
    """As `depth_thirds` with six parts: every layer its own where there are six.

    Args:
        updates: One task vector per model.
        coefficients: c_11, ..., c_16, c_21, ...

    Yields:
        (base tensor name, merged update).
    """
    yield from _by_parts(updates, coefficients)


def _by_parts(
    updates: Sequence[TaskVector], coefficients: Sequence[float]
) -> Iterator[tuple[str, Tensor]]:
    parts = len(coefficients) // len(updates)
    places = depths(name for update in updates for name in update)
    for name, deltas in by_tensor(updates):
        part = min(int(parts * (places[name] or 0.0)), parts - 1)
        yield name, weighted_sum(deltas, coefficients[part::parts])
