"""Singular values of updates, for the attacks that merge in them.

Symbols: dW_i update of model i, here a matrix; U, S, V its singular triplets, `dW = U diag(S) V'`;
c_i its coefficient; w_i = c_i / c its share of the largest coefficient c.

Updates are often of low rank (LoRA) though they arrive as full matrices. So everything here is cut
at the numerical rank, and a decomposition is worked out once and remembered.

Each of these attacks is its paper's merge of `c_i dW_i`. The papers' merges are linear in a common
factor, so equal coefficients are that factor; a model with coefficient 0 is dropped altogether.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from trap2.attacks.vectors import TaskVector, by_tensor, weighted_sum
from trap2.errors import UserError
from trap2.finite import all_finite

RANK_TOLERANCE = 1e-6
"""Singular values below this share of the Frobenius norm are float32 rounding, and cut."""

PROBES = 80
"""Random directions that find the range of a matrix of lower rank; LoRA ranks are mostly <= 64."""


@dataclass(frozen=True)
class Triplets:
    """Singular triplets of a matrix, the largest first.

    Attributes:
        U: Left singular vectors as columns.
        S: Singular values.
        V: Right singular vectors as columns.
    """

    U: Tensor
    S: Tensor
    V: Tensor

    def top(self, count: int) -> "Triplets":
        """The largest `count` triplets, or all if there are fewer."""
        return Triplets(self.U[:, :count], self.S[:count], self.V[:, :count])

    def matrix(self) -> Tensor:
        """The matrix they make up."""
        return (self.U * self.S) @ self.V.T


def triplets(matrix: Tensor, norm: float | None = None) -> Triplets:
    """All singular triplets up to the numerical rank, in float64.

    Args:
        matrix: A matrix.
        norm: What rounding is relative to, where the matrix is what a larger one left over; by
            default its own Frobenius norm.

    Raises:
        UserError: It is not finite.
    """
    if not all_finite(matrix):
        raise UserError(
            "an update holds NaN or infinity and so has no singular values; give finite updates"
        )
    wide = matrix.double()
    floor = RANK_TOLERANCE * (float(wide.norm()) if norm is None else norm)
    basis = _range(wide, floor)
    inner = wide if basis is None else basis.T @ wide
    U, S, Vh = torch.linalg.svd(inner, full_matrices=False)
    rank = int((floor < S).sum())
    return Triplets(U if basis is None else basis @ U, S, Vh.T).top(rank)


def _range(matrix: Tensor, floor: float) -> Tensor | None:
    """Orthonormal columns that span a matrix of low rank; None if its rank is not low.

    Random combinations of its columns span it, unless its rank is higher than their number; what
    they leave out tells, so the result does not depend on chance.
    """
    if min(matrix.shape) <= 2 * PROBES:
        return None
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(matrix.shape[1], PROBES, generator=generator, dtype=matrix.dtype)
    basis = torch.linalg.qr(matrix @ probes.to(matrix.device)).Q
    left_out = float((matrix - basis @ (basis.T @ matrix)).norm())
    return basis if left_out <= floor else None


def polar(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns, or rows (its orthogonal polar factor `U V'`).

    Directions that the matrix does not have stay zero instead of being filled with arbitrary ones.
    """
    found = triplets(matrix)
    return found.U @ found.V.T


def spectrum(vector: TaskVector, name: str) -> Triplets:
    """The singular triplets of one tensor of an update, in float32, remembered.

    Args:
        vector: The update.
        name: Name of a matrix that any of the updates has.
    """

    def work() -> Triplets:
        found = triplets(vector[name])
        return Triplets(found.U.float(), found.S.float(), found.V.float())

    return vector.remember(("spectrum", name), work)


@dataclass(frozen=True)
class Core:
    """Updates of one tensor in a basis that all of them share: `dW_i = left parts[i] right'`.

    Singular values are the same in it, and it is small where the updates are of low rank (the
    core space of Panariello et al. 2025, arXiv 2509.17786, up to a rotation). Where it would not
    be smaller, left and right are None for the identity.
    """

    left: Tensor | None
    right: Tensor | None
    parts: list[Tensor]

    def restore(self, matrix: Tensor) -> Tensor:
        """A matrix in this basis as one in the basis of the updates."""
        if self.left is None or self.right is None:
            return matrix
        return self.left @ matrix @ self.right.T


def core(members: Sequence[TaskVector], name: str, deltas: Sequence[Tensor]) -> Core:
    """The basis shared by the members' updates of one tensor; remembered where it is smaller.

    Args:
        members: The updates.
        name: The tensor's name; it is a matrix.
        deltas: Each member's update of it.
    """
    found = [spectrum(v, name) for v in members if name in v]
    if sum(len(f.S) for f in found) >= min(deltas[0].shape):
        return Core(None, None, [delta.double() for delta in deltas])

    def work() -> Core:
        left = triplets(torch.cat([f.U for f in found], dim=1)).U
        right = triplets(torch.cat([f.V for f in found], dim=1)).U
        return Core(left, right, [left.T @ delta.double() @ right for delta in deltas])

    return members[0].remember(("core", name, *(v.serial for v in members)), work)


MergeMatrices: TypeAlias = Callable[
    [Sequence[TaskVector], str, Sequence[Tensor], Sequence[float]], Tensor
]
"""From members, a tensor's name, their updates of it and the shares w_i to the merged update."""


def merge_matrices(
    what: tuple[object, ...],
    updates: Sequence[TaskVector],
    coefficients: Sequence[float],
    function: MergeMatrices,
) -> Iterator[tuple[str, Tensor]]:
    """Merge every matrix with a function, and all other tensors by their mean.

        matrices  dW = c * function(w_i, dW_i)
        others    dW = c * 1/N sum_i w_i dW_i      N: models whose coefficient is not 0

    The function sees only the models whose coefficient is not 0. What it gave last for equal
    coefficients is remembered, for an attacker tries many of those in a row.

    Args:
        what: Name and hyper-parameters of the attack, for the memory.
        updates: One task vector per model.
        coefficients: One coefficient per model.
        function: Merges one matrix.

    Yields:
        (base tensor name, merged update).
    """
    unit = max(coefficients, key=abs)
    active = [index for index, c in enumerate(coefficients) if c != 0]
    members = [updates[index] for index in active]
    shares = [coefficients[index] / unit for index in active]
    version = (*what, *(member.serial for member in members))
    for name, deltas in by_tensor(updates):
        given = [deltas[index] for index in active]
        if not any(name in member for member in members):
            yield name, torch.zeros_like(deltas[0])
            continue
        if given[0].ndim != 2:
            yield name, unit * mean(given, shares)
            continue

        def work(name: str = name, given: Sequence[Tensor] = given) -> Tensor:
            return function(members, name, given, shares).float()

        if all(share == 1 for share in shares):
            yield name, unit * members[0].remember(("merged", name), work, version)
        else:
            yield name, unit * work()


def mean(deltas: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """`1/N sum_i w_i dW_i`, N = len(deltas).

    Args:
        deltas: One tensor per model.
        shares: One factor w_i per model.
    """
    return weighted_sum(deltas, shares).div_(len(deltas))
