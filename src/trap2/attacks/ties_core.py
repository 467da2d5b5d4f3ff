"""TIES in core space: turn both sides of the updates into bases they share, then elect signs."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from trap2.attacks.aligned import ties_aligned
from trap2.attacks.attack import attack
from trap2.attacks.ties import COEFFICIENTS
from trap2.attacks.vectors import TaskVector


@attack(
    "ties_core",
    paper="https://arxiv.org/abs/2509.17786",
    grid={"density": (0.2, 0.5, 1.0)},
    coefficients=COEFFICIENTS,
)
def ties_core(
    updates: Sequence[TaskVector], coefficients: Sequence[float], *, density: float
) -> Iterator[tuple[str, Tensor]]:
    """Core space with TIES (Panariello et al. 2025, arXiv 2509.17786).

    Symbols: dW_i update of model i, a matrix; c_i its coefficient; U left singular vectors of the
    updates of all models with c_i != 0 side by side, V right ones of the same stacked; M_i core.

        M_i = U' dW_i V                        dW = U TIES(c_i, M_i) V'

    The paper takes U and V from LoRA's factors B_i and A_i stacked, which span the same space; an
    update alone does not say what its factors were, and full fine-tuning has none. TIES is `ties`,
    its trimming global over all cores; tensors that are no matrices take part in it as they are.
    What is rounding in M_i is made zero, so that it has no vote. At density = 1, one model at c = 1
    is that model.

    Args:
        updates: One task vector per model.
        coefficients: One coefficient per model.
        density: Share of the entries of each core that is kept, 0 < density <= 1.

    Yields:
        (base tensor name, merged update).

    Raises:
        UserError: The density is not in (0, 1].
    """
    yield from ties_aligned(updates, coefficients, density, both=True)
