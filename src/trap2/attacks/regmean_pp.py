"""RegMean++: RegMean on the inputs that a layer gets once the layers before it are merged."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from trap2.attacks.attack import attack
from trap2.attacks.chain import Layer, chained
from trap2.attacks.gram import regression, shrunk
from trap2.attacks.regmean import COEFFICIENTS
from trap2.attacks.unlabelled import Unlabelled
from trap2.attacks.vectors import TaskVector


@attack(
    "regmean_pp",
    paper="https://arxiv.org/abs/2508.03121",
    grid={"alpha": (0.9,)},
    coefficients=COEFFICIENTS,
)
def regmean_pp(
    updates: Sequence[TaskVector],
    coefficients: Sequence[float],
    *,
    data: Sequence[Unlabelled],
    alpha: float,
) -> Iterator[tuple[str, Tensor]]:
    """Regression mean along the merged model (Nguyen et al. 2025, arXiv 2508.03121).

    Symbols: H_i (tokens, in) inputs of one linear layer on the rows of model i in the merged model,
    whose layers before it are merged already; G_i = H_i'H_i / tokens with everything off its
    diagonal times a = `alpha`; dW_i (out, in) update of the layer; c_i coefficient.

        dW = (sum_i c_i dW_i G_i) (sum_i G_i)^-1

    One linear layer after another, those with the same input together. The paper may take coarser
    steps, a whole transformer block at once. One model at c = 1 is that model.

    Args:
        updates: One task vector per model.
        coefficients: One coefficient per model.
        data: Unlabelled rows of each model.
        alpha: What is left of the Gram matrices off their diagonals, 0 to 1.

    Yields:
        (base tensor name, merged update).
    """

    def solve(layer: Layer) -> Tensor:
        return regression(layer.deltas, [shrunk(G, alpha) for G in layer.merged], layer.factors)

    yield from chained(updates, coefficients, data, solve)
