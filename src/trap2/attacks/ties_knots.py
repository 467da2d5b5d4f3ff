"""TIES in the space of KnOTS: turn the updates' left sides into one basis, then elect signs."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from trap2.attacks.aligned import ties_aligned
from trap2.attacks.attack import attack
from trap2.attacks.ties import COEFFICIENTS
from trap2.attacks.vectors import TaskVector


@attack(
    "ties_knots",
    paper="https://arxiv.org/abs/2410.19735",
    grid={"density": (0.2, 0.5, 1.0)},
    coefficients=COEFFICIENTS,
)
def ties_knots(
    updates: Sequence[TaskVector], coefficients: Sequence[float], *, density: float
) -> Iterator[tuple[str, Tensor]]:
    """KnOTS with TIES (Stoica et al. 2025, arXiv 2410.19735).

    Symbols: dW_i update of model i, a matrix; c_i its coefficient; (U, S, V_i) singular triplets of
    the updates of all models with c_i != 0 side by side, V cut back into one block a model.

        [dW_1 | ... | dW_N] = U diag(S) [V_1' | ... | V_N']
        dW = U TIES(c_i, diag(S) V_i')         diag(S) V_i' = U' dW_i

    TIES is `ties`, its trimming global over the whole turned update; tensors that are no matrices
    take part in it as they are. S is with V_i as in the paper's settings for TIES. What is
    rounding in U' dW_i is made zero, so that it has no vote. At density = 1, one model at c = 1 is
    that model.

    Args:
        updates: One task vector per model.
        coefficients: One coefficient per model.
        density: Share of the entries of each turned update that is kept, 0 < density <= 1.

    Yields:
        (base tensor name, merged update).

    Raises:
        UserError: The density is not in (0, 1].
    """
    yield from ties_aligned(updates, coefficients, density, both=False)
