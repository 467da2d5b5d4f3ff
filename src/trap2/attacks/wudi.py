"""WUDI: the merged update that disturbs each model least, on what its own update looks like."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trap2.attacks.attack import attack
from trap2.attacks.spectrum import core, merge_matrices
from trap2.attacks.vectors import TaskVector

CUT = 1e-10
"""Eigenvalues of G below this share of the largest are rounding; it holds squares, in float64."""


@attack("wudi", paper="https://arxiv.org/abs/2503.08099")
def wudi(
    updates: Sequence[TaskVector], coefficients: Sequence[float]
) -> Iterator[tuple[str, Tensor]]:
    """Merging without data by least interference (Cheng et al. 2025, arXiv 2503.08099).

    Symbols: dW_i update of model i, a matrix; c_i its coefficient; T_i = c_i dW_i; |.| Frobenius
    norm; G+ pseudo-inverse.

        dW = argmin sum_i |(dW - T_i) T_i'|^2 / |T_i|^2
           = (sum_i T_i T_i' T_i / |T_i|^2) G+        G = sum_i T_i' T_i / |T_i|^2

    Rows of an update stand in for the inputs of its layer, so this is RegMean without data. The
    paper takes some hundred steps of Adam from sum_i T_i, which stay in the space of G and go
    towards this minimum; here it is reached. Tensors that are no matrices are averaged over the N
    models with c_i != 0, `1/N sum_i c_i dW_i`. One model at c = 1 is that model.

    Args:
        updates: One task vector per model.
        coefficients: One coefficient per model.

    Yields:
        (base tensor name, merged update).
    """
    yield from merge_matrices(("wudi",), updates, coefficients, _merge)


def _merge(
    members: Sequence[TaskVector], name: str, deltas: Sequence[Tensor], shares: Sequence[float]
) -> Tensor:
    space = core(members, name, deltas)
    scaled = [share * part for share, part in zip(shares, space.parts, strict=True)]
    return space.restore(least_interference(scaled))


def least_interference(updates: Sequence[Tensor]) -> Tensor:
    """The minimum above, of least norm.

    Args:
        updates: The T_i, each m x n, in float64.
    """
    weights = [1 / square if square else 0.0 for square in (float(t.norm()) ** 2 for t in updates)]
    grams = [weight * t.T @ t for weight, t in zip(weights, updates, strict=True)]
    target = torch.stack([t @ gram for t, gram in zip(updates, grams, strict=True)]).sum(0)
    total = torch.stack(grams).sum(0)
    inverse: Tensor = torch.linalg.pinv(total, rtol=CUT, hermitian=True)
    return target @ inverse
