"""CART: around the mean of the updates, add the low-rank part of what sets each one apart."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trap2.attacks.attack import attack
from trap2.attacks.spectrum import core, mean, merge_matrices, triplets
from trap2.attacks.vectors import TaskVector
from trap2.errors import UserError


@attack(
    "cart",
    paper="https://arxiv.org/abs/2412.12153",
    grid={"rank_share": (0.04, 0.08, 0.16, 0.32), "weight": (1.0,)},
)
def cart(
    updates: Sequence[TaskVector],
    coefficients: Sequence[float],
    *,
    rank_share: float,
    weight: float = 1.0,
) -> Iterator[tuple[str, Tensor]]:
    """Centered arithmetic with rank-reduced task vectors (Choi et al. 2024, arXiv 2412.12153).

    Symbols: dW_i update of model i, a matrix; c_i its coefficient; N number of models with
    c_i != 0; A their weighted mean; SVD_k(X) the nearest matrix of rank k; R rank of the space that
    all updates span together (the smaller of its two sides), min(m, n) for full fine-tuning.

        A  = 1/N sum_i c_i dW_i
        dW = A + weight * sum_i SVD_k(c_i dW_i - A)        k = ceil(rank_share * R)

    The paper takes k as a share of min(m, n), which would cut nothing of an update of low rank; R
    is the same where ranks are not low. What sets the models apart adds up to zero while nothing
    is cut, so at rank_share = 1, and always for two models, dW = A. Tensors that are no matrices
    are averaged. One model at c = 1 is that model.

    Args:
        updates: One task vector per model.
        coefficients: One coefficient per model.
        rank_share: Share of the rank that is kept, 0 < rank_share <= 1.
        weight: Factor of what sets the models apart, the paper's lambda.

    Yields:
        (base tensor name, merged update).

    Raises:
        UserError: The share of the rank is not in (0, 1].
    """
    if not 0 < rank_share <= 1:
        raise UserError(
            f"rank_share={rank_share} keeps no part of the rank; use 0 < rank_share <= 1, "
            "such as 0.08"
        )

    def merge(
        members: Sequence[TaskVector], name: str, deltas: Sequence[Tensor], shares: Sequence[float]
    ) -> Tensor:
        space = core(members, name, deltas)
        # Less a hair, so that a share like 0.07 of 100 is 7 and not, by rounding, 8.
        kept = math.ceil(rank_share * min(space.parts[0].shape) - 1e-9)
        return space.restore(_merge(space.parts, shares, kept, weight))

    yield from merge_matrices(("cart", rank_share, weight), updates, coefficients, merge)


def _merge(parts: Sequence[Tensor], shares: Sequence[float], kept: int, weight: float) -> Tensor:
    center = mean(parts, shares)
    apart = torch.zeros_like(center)
    for share, part in zip(shares, parts, strict=True):
        apart += triplets(share * part - center).top(kept).matrix()
    return center + weight * apart
