"""RegMean: merge linear layers so that on each model's own inputs they do what that model does."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from trap2.attacks.attack import attack
from trap2.attacks.gram import grams, regression, shrunk
from trap2.attacks.unlabelled import Unlabelled
from trap2.attacks.vectors import TaskVector, by_tensor, weighted_sum

COEFFICIENTS = (0.0, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
"""Around 1, where the paper merges."""


@attack(
    "regmean",
    paper="https://arxiv.org/abs/2212.09849",
    grid={"alpha": (0.9, 1.0)},
    coefficients=COEFFICIENTS,
)
def regmean(
    updates: Sequence[TaskVector],
    coefficients: Sequence[float],
    *,
    data: Sequence[Unlabelled],
    alpha: float,
) -> Iterator[tuple[str, Tensor]]:
    """Regression mean (Jin et al. 2023, arXiv 2212.09849).

    Symbols: X_i (tokens, in) inputs of one linear layer of model i on its own rows;
    G_i = X_i'X_i / tokens with everything off its diagonal times a = `alpha`; dW_i (out, in)
    update of the layer; c_i coefficient; N number of models.

        dW = (sum_i c_i dW_i G_i) (sum_i G_i)^-1      minimises sum_i |X_i (W0 + dW - W_i)'|^2
                                                      at a = 1 and c = 1
        dW = 1/N sum_i c_i dW_i                       for all other tensors

    The paper's merge of whole weights is W0 plus this. A model with coefficient 0 is left out. One
    model at c = 1 is that model.

    Args:
        updates: One task vector per model.
        coefficients: One coefficient per model.
        data: Unlabelled rows of each model.
        alpha: What is left of the Gram matrices off their diagonals, 0 to 1.

    Yields:
        (base tensor name, merged update).
    """
    names = [name for name, _ in by_tensor(updates)]
    held = [i for i, c in enumerate(coefficients) if c]
    found = [grams(updates[i], data[i], names) for i in held]
    for name, deltas in by_tensor(updates):
        chosen, factors = [deltas[i] for i in held], [coefficients[i] for i in held]
        if held and name in found[0]:
            yield name, regression(chosen, [shrunk(G[name], alpha) for G in found], factors)
        else:
            yield name, weighted_sum(deltas, [c / max(1, len(held)) for c in coefficients])
