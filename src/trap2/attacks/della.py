"""DELLA: drop entries at random, small ones more often, rescale, then merge as TIES does."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trap2.attacks.attack import attack
from trap2.attacks.dare import keep_mask
from trap2.attacks.ties import COEFFICIENTS, elect_and_average
from trap2.attacks.vectors import TaskVector, by_tensor
from trap2.errors import UserError


@attack(
    "della",
    paper="https://arxiv.org/abs/2406.11617",
    grid={"density": (0.2, 0.5), "epsilon": (0.15,), "seed": (0,)},
    coefficients=COEFFICIENTS,
)
def della(
    updates: Sequence[TaskVector],
    coefficients: Sequence[float],
    *,
    density: float,
    epsilon: float = 0.15,
    seed: int = 0,
) -> Iterator[tuple[str, Tensor]]:
    """Magnitude-based sampling, elect sign, disjoint mean (Deep et al. 2024, arXiv 2406.11617).

    Symbols: dW_i update of model i; c_i its coefficient; r rank of an entry by magnitude within its
    row, 0 for the smallest and 1 for the largest; p its chance to stay; M_i mask; D_i what remains.

        p   = density - epsilon + 2 epsilon r          per entry
        M_i ~ Bernoulli(p)
        D_i = M_i * dW_i / p                           so that E[D_i] = dW_i
        dW  = TIES' election and disjoint mean of c_i D_i, without its trimming (`ties`)

    A tensor that is no matrix has one row, or more than one if it has more than two dimensions. The
    only entry of a row has r = 1/2. mergekit rescales to the L1 norm before the drop instead of by
    1 / p. At density = 1 and epsilon = 0, one model at c = 1 is that model; else it is so only on
    average.

    Args:
        updates: One task vector per model.
        coefficients: One coefficient per model.
        density: Mean chance that an entry stays.
        epsilon: How far the chances of a row reach below and above that mean.
        seed: Seed of the masks; with it, each (model index, tensor) has its own mask.

    Yields:
        (base tensor name, merged update).

    Raises:
        UserError: A chance would not be in (0, 1].
    """
    if not (epsilon >= 0 and density - epsilon > 0 and density + epsilon <= 1):
        raise UserError(
            f"density={density} with epsilon={epsilon} gives chances outside (0, 1]; use "
            "0 <= epsilon < density <= 1 - epsilon, such as density=0.5 and epsilon=0.15"
        )
    for name, deltas in by_tensor(updates):
        kept = []
        for index, (update, delta) in enumerate(zip(updates, deltas, strict=True)):
            if name in update:
                chance = density - epsilon + 2 * epsilon * ranks(update, name)
                mask = keep_mask(delta, 1 - chance, f"{seed} {index} {name}")
                kept.append(delta * mask / chance)
            else:
                kept.append(delta)
        yield name, elect_and_average(kept, coefficients)


def ranks(update: TaskVector, name: str) -> Tensor:
    """Each entry's rank by magnitude within its row, from 0 to 1; ties go by place.

    Args:
        update: The update.
        name: The tensor's name.
    """

    def work() -> Tensor:
        sizes = update[name].abs()
        length = sizes.shape[-1] if sizes.ndim else 1
        if length < 2:
            return torch.full_like(sizes, 0.5)
        order = sizes.argsort(dim=-1, stable=True)
        even = torch.linspace(0, 1, length, device=sizes.device).expand(sizes.shape)
        return torch.empty_like(sizes).scatter_(-1, order, even)

    # Sorting is most of the work of a merge, and the same for all coefficients and chances.
    return update.remember(("ranks", name), work)
