"""Chain of Merges: each layer answers the merged model's inputs as the models answer their own."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trap2.attacks.attack import attack
from trap2.attacks.chain import Layer, chained
from trap2.attacks.gram import solved
from trap2.attacks.regmean import COEFFICIENTS
from trap2.attacks.unlabelled import Unlabelled
from trap2.attacks.vectors import TaskVector


@attack(
    "chain_of_merges",
    paper="https://arxiv.org/abs/2508.21421",
    coefficients=COEFFICIENTS,
)
def chain_of_merges(
    updates: Sequence[TaskVector],
    coefficients: Sequence[float],
    *,
    data: Sequence[Unlabelled],
) -> Iterator[tuple[str, Tensor]]:
    """Layer-wise least squares along the merged model (Buzzega et al. 2025, arXiv 2508.21421).

    Symbols: X_i (tokens, in) inputs of one linear layer in model i on its own rows; H_i the same
    rows' inputs of it in the merged model, whose layers before it are merged already; W0 (out, in)
    base; W_i = W0 + dW_i; c_i coefficient.

        dW = (sum_i c_i (W_i X_i'H_i - W0 H_i'H_i)) (sum_i H_i'H_i)^-1

    At c = 1 it minimises sum_i |H_i (W0 + dW)' - X_i W_i'|^2. Products are means over tokens, so
    every model counts as much as another, however long its rows are. The objective is taken from
    descriptions of the paper, whose own code was not at hand. One model at c = 1 is that model.

    Args:
        updates: One task vector per model.
        coefficients: One coefficient per model.
        data: Unlabelled rows of each model.

    Yields:
        (base tensor name, merged update).
    """
    yield from chained(updates, coefficients, data, _least_squares, crossed=True)


def _least_squares(layer: Layer) -> Tensor:
    W0 = layer.base.double()
    targets, means = [], []
    known = zip(layer.factors, layer.deltas, layer.crossed, layer.merged, strict=True)
    for c, dW, crossed, merged in known:
        targets.append(c * ((W0 + dW.double()) @ crossed - W0 @ merged))
        means.append(c * dW.double())
    G = torch.stack(layer.merged).sum(0)
    return solved(torch.stack(targets).sum(0), G, torch.stack(means).mean(0))
