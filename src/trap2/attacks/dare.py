"""DARE: drop entries of each update at random and rescale the rest, then merge as TIES does."""

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trap2.attacks.attack import attack
from trap2.attacks.ties import COEFFICIENTS, elect_and_average
from trap2.attacks.vectors import TaskVector, by_tensor
from trap2.errors import UserError


@attack(
    "dare_ties",
    paper="https://arxiv.org/abs/2311.03099",
    grid={"drop": (0.1, 0.5, 0.9), "seed": (0,)},
    coefficients=COEFFICIENTS,
)
def dare_ties(
    updates: Sequence[TaskVector], coefficients: Sequence[float], *, drop: float, seed: int = 0
) -> Iterator[tuple[str, Tensor]]:
    """Drop and rescale, then elect sign and disjoint mean (Yu et al. 2024, arXiv 2311.03099).

    Symbols: dW_i update of model i; c_i its coefficient; p = `drop`; M_i mask; D_i what remains.

        M_i ~ Bernoulli(1 - p) per entry
        D_i = M_i * dW_i / (1 - p)              so that E[D_i] = dW_i
        dW  = TIES' election and disjoint mean of c_i D_i, without its trimming (`ties`)

    mergekit rescales to the L1 norm before the drop instead of by 1 / (1 - p), and adds up where
    the paper averages.

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
        yield name, elect_and_average(kept, coefficients)


def dropped(
    updates: Sequence[TaskVector], drop: float, seed: int
) -> Iterator[tuple[str, list[Tensor]]]:
    """What the drop leaves of the updates, the D_i above, tensor by tensor.

    Args:
        updates: One task vector per model.
        drop: Chance that an entry is dropped, 0 <= drop < 1.
        seed: Seed of the masks.

    Yields:
        (base tensor name, [D_1, D_2, ...]).

    Raises:
        UserError: The drop is not in [0, 1).
    """
    if not 0 <= drop < 1:
        raise UserError(f"drop={drop} leaves nothing to rescale; use 0 <= drop < 1, such as 0.9")
    for name, deltas in by_tensor(updates):
        yield (
            name,
            [
                (delta * keep_mask(delta, drop, f"{seed} {index} {name}")).div_(1 - drop)
                for index, delta in enumerate(deltas)
            ],
        )


def keep_mask(delta: Tensor, drop: float | Tensor, key: str) -> Tensor:
    """Which entries stay: a Bernoulli(1 - drop) mask that depends on the key alone.

    It comes from a generator of its own, so no random stream of the caller moves.

    Args:
        delta: Tensor to mask.
        drop: Chance that an entry is dropped; one for all, or one for each.
        key: Text that names the mask.
    """
    return (
        torch.rand(delta.shape, generator=named_generator(f"dare {key}")).to(delta.device) >= drop
    )


def named_generator(key: str) -> torch.Generator:
    """A generator whose seed depends on the key alone."""
    digest = hashlib.sha256(f"trap2 {key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
