"""Iso-C: keep the singular directions of the sum of the updates, and make them equally strong."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from trap2.attacks.attack import attack
from trap2.attacks.spectrum import core, merge_matrices, triplets
from trap2.attacks.vectors import TaskVector, weighted_sum


@attack("iso_c", paper="https://arxiv.org/abs/2502.04959")
def iso_c(
    updates: Sequence[TaskVector], coefficients: Sequence[float]
) -> Iterator[tuple[str, Tensor]]:
    """Isotropic merging in the common subspace (Marczak et al. 2025, arXiv 2502.04959).

    Symbols: dW_i update of model i, a matrix; c_i its coefficient; (U, S, V) singular triplets of
    the weighted sum; r its rank.

        U diag(S) V' = sum_i c_i dW_i
        dW = mean(S) * U V'                    mean(S) = (S_1 + ... + S_r) / r

    Triplets whose singular value is zero are left out of the mean and of the merge. The paper has
    none; its code, given updates of low rank, fills them with arbitrary directions. Tensors that
    are no matrices are averaged over the N models with c_i != 0, `1/N sum_i c_i dW_i`.

    One model at c = 1 is not that model, unless its singular values are equal.

    Args:
        updates: One task vector per model.
        coefficients: One coefficient per model.

    Yields:
        (base tensor name, merged update).
    """
    yield from merge_matrices(("iso_c",), updates, coefficients, _merge)


def _merge(
    members: Sequence[TaskVector], name: str, deltas: Sequence[Tensor], shares: Sequence[float]
) -> Tensor:
    space = core(members, name, deltas)
    found = triplets(weighted_sum(space.parts, shares))
    return space.restore(isotropic(found.U, found.S, found.V))


def isotropic(U: Tensor, S: Tensor, V: Tensor) -> Tensor:
    """`mean(S) U V'`; zero if there are no singular values."""
    return S.sum() / max(1, len(S)) * (U @ V.T)
