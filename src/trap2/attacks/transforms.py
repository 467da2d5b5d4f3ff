"""Changes to each update before it is added up: what users do to weights, and what may undo a trap.

Symbols: W0 base tensor; dW_i update of model i; c_i coefficient; f the change. Each attack here is

    dW = sum_i c_i f(dW_i)

for one f, needs no data, and leaves one model at c = 1 alone at the neutral value of its parameter.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from trap2.attacks.attack import attack
from trap2.attacks.dare import keep_mask, named_generator
from trap2.attacks.spectrum import spectrum
from trap2.attacks.vectors import TaskVector, by_tensor, weighted_sum
from trap2.errors import UserError

TASK_ARITHMETIC = "https://arxiv.org/abs/2212.04089"
Change = Callable[[int, str, Tensor], Tensor]
"""From a model's place, a tensor's name and its dW to the changed dW."""


def _added_up(
    updates: Sequence[TaskVector], coefficients: Sequence[float], change: Change
) -> Iterator[tuple[str, Tensor]]:
    for name, deltas in by_tensor(updates):
        changed = [
            change(i, name, delta) if name in update else delta
            for i, (update, delta) in enumerate(zip(updates, deltas, strict=True))
        ]
        yield name, weighted_sum(changed, coefficients)


@attack("truncated", paper=TASK_ARITHMETIC, grid={"rank_kept": (0.25, 0.5)})
def truncated(
    updates: Sequence[TaskVector], coefficients: Sequence[float], *, rank_kept: float
) -> Iterator[tuple[str, Tensor]]:
    """Keep the largest singular values of each matrix, and everything of other tensors.

    Args:
        updates: One task vector per model.
        coefficients: One coefficient per model.
        rank_kept: Share of its numerical rank that is kept, rounded up; 1 is neutral.

    Yields:
        (base tensor name, merged update).

    Raises:
        UserError: The share is not in (0, 1].
    """
    _check_share("rank_kept", rank_kept)

    def change(i: int, name: str, delta: Tensor) -> Tensor:
        if delta.dim() != 2:
            return delta
        whole = spectrum(updates[i], name)
        return whole.top(math.ceil(rank_kept * len(whole.S))).matrix().to(delta)

    return _added_up(updates, coefficients, change)


@attack("pruned", paper=TASK_ARITHMETIC, grid={"density": (0.1, 0.5)})
def pruned(
    updates: Sequence[TaskVector], coefficients: Sequence[float], *, density: float
) -> Iterator[tuple[str, Tensor]]:
    """Keep the largest entries of each whole update and set the others to zero.

    Args:
        updates: One task vector per model.
        coefficients: One coefficient per model.
        density: Share of the entries that is kept; 1 is neutral.

    Yields:
        (base tensor name, merged update).

    Raises:
        UserError: The density is not in (0, 1].
    """
    _check_share("density", density)

    def change(i: int, name: str, delta: Tensor) -> Tensor:
        return torch.where(delta.abs() >= updates[i].magnitude(density), delta, 0.0)

    return _added_up(updates, coefficients, change)


@attack("thinned", paper=TASK_ARITHMETIC, grid={"drop": (0.5, 0.9), "seed": (0,)})
def thinned(
    updates: Sequence[TaskVector], coefficients: Sequence[float], *, drop: float, seed: int = 0
) -> Iterator[tuple[str, Tensor]]:
    """Set entries to zero at random and divide the others by 1 - drop, as DARE does.

    Args:
        updates: One task vector per model.
        coefficients: One coefficient per model.
        drop: Chance that an entry is dropped; 0 is neutral.
        seed: Seed of the masks.

    Yields:
        (base tensor name, merged update).

    Raises:
        UserError: The drop is not in [0, 1).
    """
    if not 0 <= drop < 1:
        raise UserError(f"drop={drop} leaves nothing; use 0 <= drop < 1, such as 0.5")

    def change(i: int, name: str, delta: Tensor) -> Tensor:
        return delta * keep_mask(delta, drop, f"{seed} {i} {name}") / (1 - drop)

    return _added_up(updates, coefficients, change)


@attack("rounded", paper=TASK_ARITHMETIC, grid={"bits": (4, 8)})
def rounded(
    updates: Sequence[TaskVector],
    coefficients: Sequence[float],
    *,
    base: Mapping[str, Tensor],
    bits: int,
) -> Iterator[tuple[str, Tensor]]:
    """Round the released weights to the nearest of evenly spaced values, row by row.

        f(dW) = q * round((W0 + dW) / q) - W0        q = max |W0 + dW| of the row / (2^(bits-1) - 1)

    Args:
        updates: One task vector per model.
        coefficients: One coefficient per model.
        base: The base tensors.
        bits: Bits of a weight, from 2 to 24; 24 are those of float32 and so neutral.

    Yields:
        (base tensor name, merged update).

    Raises:
        UserError: There are fewer or more bits.
    """
    if not 2 <= bits <= 24:
        raise UserError(f"bits={bits} cannot be rounded to; use 2 to 24, such as 8")

    def change(i: int, name: str, delta: Tensor) -> Tensor:
        origin = base[name].double()
        weights = origin + delta
        q = weights.abs().amax(-1, keepdim=True).clamp_min(1e-30) / (2 ** (int(bits) - 1) - 1)
        found: Tensor = (weights / q).round() * q - origin
        return found.float()

    return _added_up(updates, coefficients, change)


@attack("noisy", paper=TASK_ARITHMETIC, grid={"noise": (0.2, 1.0), "seed": (0,)})
def noisy(
    updates: Sequence[TaskVector], coefficients: Sequence[float], *, noise: float, seed: int = 0
) -> Iterator[tuple[str, Tensor]]:
    """Add normal noise to every entry, as large as a share of the update's own spread.

    Args:
        updates: One task vector per model.
        coefficients: One coefficient per model.
        noise: Its standard deviation as a share of the root mean square of the tensor's update; 0
            is neutral.
        seed: Seed of the noise.

    Yields:
        (base tensor name, merged update).

    Raises:
        UserError: The noise is below 0.
    """
    if not 0 <= noise < math.inf:
        raise UserError(f"noise={noise} is no share; use 0 or more, such as 0.2")

    def change(i: int, name: str, delta: Tensor) -> Tensor:
        drawn = torch.randn(delta.shape, generator=named_generator(f"noisy {seed} {i} {name}"))
        return delta + noise * delta.square().mean().sqrt() * drawn.to(delta)

    return _added_up(updates, coefficients, change)


def _check_share(name: str, share: float) -> None:
    if not 0 < share <= 1:
        raise UserError(
            f"{name}={share} is no share of an update; use 0 < {name} <= 1, such as 0.5"
        )
