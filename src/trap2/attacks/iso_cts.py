"""Iso-CTS: Iso-C with the weakest common directions replaced by directions of single models."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trap2.attacks.attack import attack
from trap2.attacks.iso_c import isotropic
from trap2.attacks.spectrum import core, merge_matrices, polar, triplets
from trap2.attacks.vectors import TaskVector, weighted_sum
from trap2.errors import UserError


@attack("iso_cts", paper="https://arxiv.org/abs/2502.04959", grid={"common": (0.5, 0.8)})
def iso_cts(
    updates: Sequence[TaskVector], coefficients: Sequence[float], *, common: float = 0.8
) -> Iterator[tuple[str, Tensor]]:
    """Isotropic merging, common and task-specific (Marczak et al. 2025, arXiv 2502.04959).

    Symbols: dW_i update of model i, a matrix; c_i its coefficient; N number of models with
    c_i != 0; (U, S, V) singular triplets of the weighted sum and r its rank; p = `common`;
    q directions go to each model and the k = r - N q largest stay common; U_k: the first k of U.

        U diag(S) V' = sum_i c_i dW_i          q = round((r - floor(p r)) / N) <= r / N
        R_i  = c_i dW_i - U_k U_k' c_i dW_i    (U_i, S_i, V_i) its q largest singular triplets
        U^ = polar([U_k | U_1 | ... | U_N])    V^ = polar([V_k | V_1 | ... | V_N])
        dW = mean(S_1..S_k, all S_i) * U^ V^'

    polar(X) is the nearest matrix with orthonormal columns. Zero singular values are left out as in
    `iso_c`, and other tensors are averaged as there. One model at c = 1 is `iso_c` of that model,
    so not that model.

    Args:
        updates: One task vector per model.
        coefficients: One coefficient per model.
        common: Share of the directions that stays common, 0 <= common <= 1; 1 is `iso_c`.

    Yields:
        (base tensor name, merged update).

    Raises:
        UserError: The common share is not in [0, 1].
    """
    if not 0 <= common <= 1:
        raise UserError(
            f"common={common} is no share of the singular directions; use 0 <= common <= 1, "
            "such as 0.8"
        )

    def merge(
        members: Sequence[TaskVector], name: str, deltas: Sequence[Tensor], shares: Sequence[float]
    ) -> Tensor:
        space = core(members, name, deltas)
        return space.restore(_merge(space.parts, shares, common))

    yield from merge_matrices(("iso_cts", common), updates, coefficients, merge)


def _merge(parts: Sequence[Tensor], shares: Sequence[float], common: float) -> Tensor:
    whole = triplets(weighted_sum(parts, shares))
    rank, count = len(whole.S), len(parts)
    # Rounding up could take more directions than there are.
    each = min(round((rank - int(common * rank)) / count), rank // count)
    shared = whole.top(rank - count * each)
    blocks = [shared]
    for share, part in zip(shares, parts, strict=True):
        own = share * part
        rest = own - shared.U @ (shared.U.T @ own)
        blocks.append(triplets(rest, float(own.norm())).top(each))
    U, S, V = (torch.cat([getattr(block, name) for block in blocks], -1) for name in "USV")
    return isotropic(polar(U), S, polar(V))
