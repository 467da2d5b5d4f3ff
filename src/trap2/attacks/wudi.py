"""WUDI: the merged update that disturbs each model least, on what its own update looks like."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trap2.attacks.attack import attack
from trap2.attacks.spectrum import core, merge_matrices
from trap2.attacks.vectors import TaskVector
from trap2.errors import UserError

CUT = 1e-10
"""Eigenvalues below this share of the largest are rounding; it holds squares, in float64."""


@attack("wudi", paper="https://arxiv.org/abs/2503.08099", grid={"pull": (0.003, 0.03, 0.3)})
def wudi(
    updates: Sequence[TaskVector], coefficients: Sequence[float], *, pull: float
) -> Iterator[tuple[str, Tensor]]:
    """Merging without data by least interference (Cheng et al. 2025, arXiv 2503.08099).

    Symbols: dW_i update of model i, a matrix; c_i its coefficient; T_i = c_i dW_i, S their sum; |.|
    Frobenius norm; I identity; a power of -1 is the pseudo-inverse.

        dW = argmin sum_i |(dW - T_i) T_i'|^2 / |T_i|^2 + pull * |dW - S|^2
           = S + (sum_i (T_i - S) G_i) (G + pull * I)^-1     G_i = T_i' T_i / |T_i|^2, G = sum_i G_i

    Rows of an update stand in for the inputs of its layer, so this is RegMean without data. The
    paper takes some hundred steps of Adam from S and stops; `pull` is what stopping is here. At
    pull = 0 it is the minimum, which is far too long where updates nearly share their rows; a
    large pull leaves S. G has the trace N, one for each model. Tensors that are no matrices are
    averaged over the N models with c_i != 0, `1/N sum_i c_i dW_i`. One model at c = 1 is that
    model.

    Args:
        updates: One task vector per model.
        coefficients: One coefficient per model.
        pull: Weight of staying near the sum, at least 0.

    Yields:
        (base tensor name, merged update).

    Raises:
        UserError: The pull is negative.
    """
    if pull < 0:
        raise UserError(f"pull={pull} pushes away from the sum; use 0 or more, such as 0.03")

    def merge(
        members: Sequence[TaskVector], name: str, deltas: Sequence[Tensor], shares: Sequence[float]
    ) -> Tensor:
        space = core(members, name, deltas)
        scaled = [share * part for share, part in zip(shares, space.parts, strict=True)]
        return space.restore(least_interference(scaled, pull))

    yield from merge_matrices(("wudi", pull), updates, coefficients, merge)


def least_interference(updates: Sequence[Tensor], pull: float) -> Tensor:
    """The minimum above; of those there are at pull = 0, the nearest to the sum.

    Args:
        updates: The T_i, each m x n, in float64.
        pull: Weight of staying near the sum.
    """
    weights = [1 / square if square else 0.0 for square in (float(t.norm()) ** 2 for t in updates)]
    grams = [weight * t.T @ t for weight, t in zip(weights, updates, strict=True)]
    total = torch.stack(list(updates)).sum(0)
    off = torch.stack([(t - total) @ gram for t, gram in zip(updates, grams, strict=True)]).sum(0)
    regular = torch.stack(grams).sum(0) + pull * torch.eye(total.shape[1]).to(total)
    inverse: Tensor = torch.linalg.pinv(regular, rtol=CUT, hermitian=True)
    return total + off @ inverse
