"""Model Breadcrumbs: leave out the largest and the smallest entries of each update, then add up."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trap2.attacks.attack import attack
from trap2.attacks.vectors import TaskVector, by_tensor, weighted_sum
from trap2.errors import UserError


@attack(
    "breadcrumbs",
    paper="https://arxiv.org/abs/2312.06795",
    grid={"density": (0.15, 0.5, 0.9), "gamma": (0.01,)},
)
def breadcrumbs(
    updates: Sequence[TaskVector],
    coefficients: Sequence[float],
    *,
    density: float,
    gamma: float = 0.01,
) -> Iterator[tuple[str, Tensor]]:
    """Masks from both tails, then task arithmetic (Davari & Belilovsky 2023, arXiv 2312.06795).

    Symbols: dW_i update of model i, one tensor of n entries; c_i its coefficient; M_i its mask.

        M_i = 0 for the floor(gamma n) largest entries by magnitude, 1 for the next
              round(density n), 0 for the rest; per tensor
        dW  = sum_i c_i M_i dW_i

    At least one entry is kept, and if gamma + density > 1 fewer of the largest are left out, as in
    mergekit; entries that tie with the smallest or largest one kept are all kept. At density = 1
    one model at c = 1 is that model.

    Args:
        updates: One task vector per model.
        coefficients: One coefficient per model.
        density: Share of the entries of each tensor that is kept, 0 < density <= 1.
        gamma: Share of the entries left out for being largest, 0 <= gamma < 1.

    Yields:
        (base tensor name, merged update).

    Raises:
        UserError: The density is not in (0, 1] or gamma not in [0, 1).
    """
    if not (0 < density <= 1 and 0 <= gamma < 1):
        raise UserError(
            f"density={density} with gamma={gamma} keeps no share of an update; use "
            "0 < density <= 1 and 0 <= gamma < 1, such as density=0.15 and gamma=0.01"
        )
    for name, deltas in by_tensor(updates):
        kept = []
        for update, delta in zip(updates, deltas, strict=True):
            if name in update and delta.numel():
                low, high = bounds(update, name, density, gamma)
                size = delta.abs()
                kept.append(torch.where((size >= low) & (size <= high), delta, 0.0))
            else:
                kept.append(delta)
        yield name, weighted_sum(kept, coefficients)


def bounds(update: TaskVector, name: str, density: float, gamma: float) -> tuple[float, float]:
    """The smallest and the largest magnitude that is kept of one tensor; remembered.

    Args:
        update: The update.
        name: The tensor's name.
        density: Share of the entries that is kept.
        gamma: Share of the entries left out for being largest.
    """

    def work() -> tuple[float, float]:
        sizes = update[name].abs().flatten()
        count = sizes.numel()
        kept = max(1, round(density * count))
        last = count - min(int(gamma * count), count - kept)
        return float(sizes.kthvalue(last - kept + 1).values), float(sizes.kthvalue(last).values)

    return update.remember(("breadcrumbs", name, density, gamma), work)
