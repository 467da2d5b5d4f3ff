"""TIES in a basis that the models' updates share, in which their signs can be compared.

Symbols: dW_i update of model i, a matrix; U left singular vectors of all updates side by side, V
right ones of all updates stacked.

Merges that are linear, or that go by singular values, are the same in every basis; TIES is not.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trap2.attacks.spectrum import RANK_TOLERANCE, spectrum, triplets
from trap2.attacks.ties import elect_and_average, trimmed
from trap2.attacks.vectors import TaskVector, by_tensor


@dataclass(frozen=True)
class Aligned:
    """Updates whose matrices are in a basis they share; other tensors are as they were.

    Attributes:
        vectors: The updates in that basis.
        left: By name, U of each matrix.
        right: By name, V of each matrix; empty if only the left sides share a basis.
    """

    vectors: list[TaskVector]
    left: dict[str, Tensor]
    right: dict[str, Tensor]

    def restore(self, name: str, merged: Tensor) -> Tensor:
        """A merged tensor in the basis of the updates again."""
        if name in self.left:
            merged = self.left[name] @ merged
        return merged @ self.right[name].T if name in self.right else merged


def align(members: Sequence[TaskVector], both: bool) -> Aligned:
    """Put updates into a basis they share, tensor by tensor.

    Args:
        members: The updates.
        both: Whether the right sides share a basis too.
    """
    held: list[dict[str, Tensor]] = [{} for _ in members]
    left: dict[str, Tensor] = {}
    right: dict[str, Tensor] = {}
    for name, deltas in by_tensor(members):
        if deltas[0].ndim == 2 and any(bool(delta.any()) for delta in deltas):
            found = [spectrum(v, name) for v in members if name in v]
            # Singular as those of all updates side by side: the V_i left out are orthonormal.
            left[name] = triplets(torch.cat([f.U * f.S for f in found], dim=1)).U.float()
            if both:
                right[name] = triplets(torch.cat([f.V * f.S for f in found], dim=1)).U.float()
        for part, member, delta in zip(held, members, deltas, strict=True):
            if name in member and name in left:
                turned = left[name].T @ delta
                turned = turned @ right[name] if both else turned
                # Rounding is no vote: TIES would count it among those that agree.
                part[name] = torch.where(turned.abs() > RANK_TOLERANCE * delta.norm(), turned, 0.0)
            elif name in member:
                part[name] = delta
    return Aligned([TaskVector.of(part) for part in held], left, right)


def ties_aligned(
    updates: Sequence[TaskVector], coefficients: Sequence[float], density: float, both: bool
) -> Iterator[tuple[str, Tensor]]:
    """`ties` in the basis shared by all models whose coefficient is not 0.

    Args:
        updates: One task vector per model.
        coefficients: One coefficient per model.
        density: Share of the entries of each aligned update that is kept.
        both: Whether the right sides share a basis too.

    Yields:
        (base tensor name, merged update).

    Raises:
        UserError: The density is not in (0, 1].
    """
    active = [index for index, c in enumerate(coefficients) if c != 0]
    members = [updates[index] for index in active]
    if members:
        version = (both, *(member.serial for member in members))
        aligned = members[0].remember(("aligned",), lambda: align(members, both), version)
        weights = [coefficients[index] for index in active]
        for name, kept in trimmed(aligned.vectors, density):
            yield name, aligned.restore(name, elect_and_average(kept, weights))
    for name, deltas in by_tensor(updates):
        if not any(name in member for member in members):
            yield name, torch.zeros_like(deltas[0])
