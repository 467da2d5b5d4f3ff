"""The change of basis that brings two tensors which meet nearest to two others.

Symbols: X, Y parts of a release that meet in a block, with one row a dimension of the block; X0, Y0
the same of the base; M change of basis. The function depends on X^H Y alone, so M X and M^-H Y are
the same release, and the nearest to the base is the one with the least

    |M X - X0|^2 + |M^-H Y - Y0|^2

over all M of one kind. ^H is the transpose, conjugate where the numbers are complex. The first
dimension is a batch of blocks.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

Solve: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""From X (blocks, h, m), Y (blocks, h, n), X0 and Y0 to M (blocks, h, h)."""

STEPS, SETTLED = 20, 1e-14
"""Gauss-Newton steps at most, and the share of change that is none; few steps are needed where the
release is near its base in some basis."""

NEAR = 2.0
"""A smaller kind of change is taken if it comes so near, as a multiple of the least distance. So a
release in the base's basis stays as it is, though M could always fit a little of its update; and a
basis that is off by no more than the update is large hardly matters to a merge, for on small steps
in it the function stays in the first order."""

ROUNDING = 1e-6
"""Distances as small as this share of the base's own length are rounding."""


def invertible(X: Tensor, Y: Tensor, X0: Tensor, Y0: Tensor) -> Tensor:
    """Any invertible M: the coupled solve, in which a pair's product is kept exactly.

    Starts from the least squares fit of one of the two parts, whichever comes nearer, and goes on
    with Gauss-Newton in E, M <- exp(E) M, where the linear problem is a Sylvester equation:

        A E' + E' B = C',  A = Y1 Y1^H,  B = X1 X1^H,  C' = (X0 - X1) X1^H - Y1 (Y0 - Y1)^H

    with X1 = M X and Y1 = M^-H Y.
    """
    A, P, B, Q = X @ X.mH, X0 @ X.mH, Y @ Y.mH, Y0 @ Y.mH

    def left(M: Tensor) -> Tensor:
        """What of the distance depends on M."""
        S = _dual(M)
        quadratic = (M @ A * M.conj()).real + (S @ B * S.conj()).real
        linear = (M.conj() * P).real + (S.conj() * Q).real
        return (quadratic - 2 * linear).sum((1, 2))

    start = _sound(P @ torch.linalg.pinv(A, hermitian=True))
    other = _sound(_dual(_sound(Q @ torch.linalg.pinv(B, hermitian=True))))
    M = torch.where(_wide(left(other) < left(start)), other, start)
    length, step = left(M), torch.ones_like(left(M))
    for _ in range(STEPS):
        S = _dual(M)
        now, dual = M @ A @ M.mH, S @ B @ S.mH
        E = _sylvester(dual, now, P @ M.mH - now - (Q @ S.mH).mH + dual)
        moved = torch.linalg.matrix_exp(_wide(step) * E) @ M
        change = left(moved) - length
        better = change < 0
        M, length = torch.where(_wide(better), moved, M), length + change.clamp_max(0.0)
        step = torch.where(better, 1.0, step / 2)
        if bool((change.abs() <= SETTLED * length.abs()).all()):
            break
    return M


def rotation(X: Tensor, Y: Tensor, X0: Tensor, Y0: Tensor) -> Tensor:
    """Orthogonal M (Procrustes, arXiv 2502.00264): U V' of the SVD of X0 X' + Y0 Y'."""
    U, _, Vh = torch.linalg.svd(X0 @ X.mT + Y0 @ Y.mT)
    M: Tensor = U @ Vh
    return M


def scale(X: Tensor, Y: Tensor, X0: Tensor, Y0: Tensor) -> Tensor:
    """Diagonal M: every dimension is a block of width one."""
    rows = [part.reshape(-1, 1, part.shape[2]) for part in (X, Y, X0, Y0)]
    return torch.diag_embed(invertible(*rows).reshape(X.shape[:2]))


def rotary(X: Tensor, Y: Tensor, X0: Tensor, Y0: Tensor) -> Tensor:
    """What commutes with RoPE: one complex number for each pair (j, j + h/2) of dimensions."""
    half = X.shape[1] // 2
    pairs = [torch.complex(part[:, :half], part[:, half:]) for part in (X, Y, X0, Y0)]
    z = invertible(*(part.reshape(-1, 1, part.shape[2]) for part in pairs)).reshape(-1, half)
    real, imaginary = torch.diag_embed(z.real), torch.diag_embed(z.imag)
    return torch.cat([torch.cat([real, -imaginary], 2), torch.cat([imaginary, real], 2)], 1)


KINDS: dict[str, Solve] = {
    "scale": scale,
    "rotation": rotation,
    "rotary": rotary,
    "invertible": invertible,
}


def change_of_basis(
    kinds: tuple[str, ...], X: Tensor, Y: Tensor, X0: Tensor, Y0: Tensor
) -> tuple[Tensor, Tensor] | None:
    """The smallest kind of change that comes about as near to the base as any.

    Args:
        kinds: Kinds of M to try, the smallest first.
        X: One part of the release (blocks, h, m).
        Y: The part it meets (blocks, h, n).
        X0: The first part of the base.
        Y0: The second part of the base.

    Returns:
        M and M^-T (blocks, h, h); None where the release stays as it is.
    """
    found = [(M, _dual(M)) for M in (KINDS[kind](X, Y, X0, Y0) for kind in kinds)]
    still = _length(X - X0, Y - Y0)
    distances = [still, *(_length(M @ X - X0, S @ Y - Y0) for M, S in found)]
    enough = NEAR * min(d for d in distances if d == d) + ROUNDING * _length(X0, Y0)
    taken = next(place for place, d in enumerate(distances) if d <= enough)
    return found[taken - 1] if taken else None


def fitted(ridge: float, part: Tensor, base: Tensor) -> Tensor:
    """M with the least |M X - X0|^2 + ridge |M|^2, for one part without the one it meets."""
    A = part @ part.mT + ridge * torch.eye(part.shape[1], dtype=part.dtype)
    solved: Tensor = torch.linalg.solve(A, part @ base.mT)
    return solved.mT


def _sylvester(A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """E with A E + E B = C, for A and B with no negative eigenvalues; least squares where 0."""
    a, U = torch.linalg.eigh(A)
    b, V = torch.linalg.eigh(B)
    sums = a.unsqueeze(2) + b.unsqueeze(1)
    floor = 1e-12 * sums.amax((1, 2), keepdim=True)
    inner = torch.where(sums > floor, (U.mH @ C @ V) / sums.clamp_min(1e-300), 0.0)
    E: Tensor = U @ inner @ V.mH
    return E


def _dual(M: Tensor) -> Tensor:
    """M^-H; not a number where there is none."""
    inverse: Tensor = torch.linalg.inv_ex(M).inverse
    return inverse.mH


def _sound(M: Tensor) -> Tensor:
    """M where it has an inverse in this precision, else the identity."""
    values = torch.linalg.svdvals(M)
    good = values[:, -1] > 1e-10 * values[:, 0]
    return torch.where(_wide(good), M, torch.eye(M.shape[1], dtype=M.dtype))


def _wide(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1)


def _length(*parts: Tensor) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(part)) for part in parts))
