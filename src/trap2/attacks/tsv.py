"""TSV-M: give each model's leading singular directions room of their own, then add them up."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trap2.attacks.attack import attack
from trap2.attacks.spectrum import Triplets, merge_matrices, polar, spectrum
from trap2.attacks.vectors import TaskVector


@attack("tsv", paper="https://arxiv.org/abs/2412.00081")
def tsv(
    updates: Sequence[TaskVector], coefficients: Sequence[float]
) -> Iterator[tuple[str, Tensor]]:
    """Merging by task singular vectors, TSV-M (Gargiulo et al. 2025, arXiv 2412.00081).

    Symbols: dW_i update of model i, an m x n matrix; c_i its coefficient; N number of models with
    c_i != 0; (U_i, S_i, V_i) its leading singular triplets.

        dW_i ~ U_i diag(S_i) V_i'              the largest floor(min(m, n) / N), but at least 1
        U^ = polar([U_1 | ... | U_N])          V^ = polar([V_1 | ... | V_N])
        dW = U^ diag(c_1 S_1, ..., c_N S_N) V^'

    polar(X) is the nearest matrix with orthonormal columns. Singular values that are rounding are
    cut first: the paper's code keeps their arbitrary directions, which would turn those of an
    update of low rank. Tensors that are no matrices are averaged, `1/N sum_i c_i dW_i`. One model
    at c = 1 is that model.

    Args:
        updates: One task vector per model.
        coefficients: One coefficient per model.

    Yields:
        (base tensor name, merged update).
    """
    yield from merge_matrices(("tsv",), updates, coefficients, _merge)


def _merge(
    members: Sequence[TaskVector], name: str, deltas: Sequence[Tensor], shares: Sequence[float]
) -> Tensor:
    count = max(1, min(deltas[0].shape) // len(members))
    holders = [index for index, member in enumerate(members) if name in member]
    tops = [spectrum(members[index], name).top(count) for index in holders]

    def whiten() -> Triplets:
        U, S, V = (torch.cat([getattr(top, part) for top in tops], -1) for part in "USV")
        return Triplets(polar(U).float(), S, polar(V).float())

    # Coefficients act on S alone, so that whitening is needed once for each choice of models.
    version = tuple(member.serial for member in members)
    whitened = members[0].remember(("whitened", name), whiten, version)
    factors = torch.cat(
        [shares[index] * torch.ones_like(top.S) for index, top in zip(holders, tops, strict=True)]
    )
    return Triplets(whitened.U, factors * whitened.S, whitened.V).matrix()
