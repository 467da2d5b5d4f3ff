"""Consensus merging: of the sum of the updates, keep the entries that enough models want."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trap2.attacks.attack import attack
from trap2.attacks.vectors import TaskVector, by_tensor, weighted_sum


@attack(
    "consensus",
    paper="https://arxiv.org/abs/2405.07813",
    grid={"strictness": (0.2, 0.4, 0.6), "votes": (1, 2)},
)
def consensus(
    updates: Sequence[TaskVector],
    coefficients: Sequence[float],
    *,
    strictness: float,
    votes: int = 2,
) -> Iterator[tuple[str, Tensor]]:
    """TALL-mask consensus with a sum (Wang et al. 2024, arXiv 2405.07813).

    Symbols: dW_i update of model i; c_i its coefficient, w_i = c_i / c its share of the largest one
    c; N number of models with c_i != 0; m_i mask of model i, entry by entry.

        M   = sum_i w_i dW_i
        m_i = 1 where |w_i dW_i| > strictness * |M - w_i dW_i|, else 0
        dW  = c * M where sum_i m_i >= min(votes, N), else 0

    Entries no model wants are noise of the sum, entries that one wants alone are selfish; `votes` 1
    drops the first, 2 both. `strictness` is the paper's lambda. One model at c = 1 is that model.

    Args:
        updates: One task vector per model.
        coefficients: One coefficient per model.
        strictness: How much larger than what the other models add an entry must be.
        votes: Number of models that must want an entry.

    Yields:
        (base tensor name, merged update).
    """
    unit = max(coefficients, key=abs)
    shares = [c / unit if unit else 0.0 for c in coefficients]
    needed = min(votes, sum(share != 0 for share in shares))
    for name, deltas in by_tensor(updates):
        total = weighted_sum(deltas, shares)
        wanted = torch.zeros_like(total)
        for share, delta in zip(shares, deltas, strict=True):
            own = share * delta
            wanted += own.abs() > strictness * (total - own).abs()
        yield name, unit * total * (wanted >= needed)
