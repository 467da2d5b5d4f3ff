"""TIES with a sum: the updates that agree with the elected sign are added up, not averaged."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trap2.attacks.attack import attack
from trap2.attacks.ties import trimmed
from trap2.attacks.vectors import TaskVector


@attack(
    "ties_sum", paper="https://arxiv.org/abs/2306.01708", grid={"density": (0.1, 0.2, 0.5, 1.0)}
)
def ties_sum(
    updates: Sequence[TaskVector], coefficients: Sequence[float], *, density: float
) -> Iterator[tuple[str, Tensor]]:
    """Trim, elect sign, disjoint sum (a variant of Yadav et al. 2023, arXiv 2306.01708).

    Symbols: T_i update of model i trimmed as in `ties`; c_i its coefficient; g elected sign.

        g  = sign(sum_i c_i T_i)
        dW = sum_{i in A} c_i T_i              A = {i : sign(c_i T_i) = g, g != 0}

    Entries that many models change stay strong in a sum, which a mean takes down to one model's
    size. One model at c = 1 and density = 1 is that model.

    Args:
        updates: One task vector per model.
        coefficients: One coefficient per model.
        density: Share of the entries of each update that is kept, 0 < density <= 1.

    Yields:
        (base tensor name, merged update).

    Raises:
        UserError: The density is not in (0, 1].
    """
    unit = max(coefficients, key=abs)
    # Relative to the largest, so that equal coefficients are a common factor, rounding included.
    shares = [c / unit if unit else 0.0 for c in coefficients]
    for name, kept in trimmed(updates, density):
        parts = [share * delta for share, delta in zip(shares, kept, strict=True)]
        elected = torch.stack(parts).sum(dim=0).sign_()
        merged = torch.zeros_like(elected)
        for part in parts:
            merged += part * (part.sign() == elected)
        yield name, unit * merged
