"""Least squares over the inputs of linear layers, which is what RegMean and its kin solve.

Symbols: X_i (tokens, in) inputs of one linear layer on the rows of model i, padding left out;
G_i = X_i'X_i / tokens (in, in); dW_i (out, in) update of the layer's weight; a = `alpha`.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from trap2.attacks.unlabelled import Unlabelled
from trap2.attacks.vectors import TaskVector

RIDGE = 1e-6
"""Share of a Gram matrix' mean diagonal that is added to it: no more than rounding."""


class Moments:
    """Running mean of `Y'X` over tokens, in float64.

    Attributes:
        value: The mean so far, (dims of Y, dims of X).
    """

    def __init__(self) -> None:
        self.value, self._tokens = torch.zeros((), dtype=torch.float64), 0

    def add(self, left: Tensor, right: Tensor) -> None:
        """Take in a batch of tokens: `left` (tokens, p) and `right` (tokens, q)."""
        self._tokens += len(right)
        share = len(right) / max(1, self._tokens)
        product = (left.T @ right).double() / max(1, len(right))
        self.value = (1 - share) * self.value + share * product


def grams(update: TaskVector, data: Unlabelled, names: Iterable[str]) -> dict[str, Tensor]:
    """G of every linear layer of a model at W0 + dW on its own rows; remembered.

    Args:
        update: Its update.
        data: Its rows.
        names: Weights that any of the merged updates changes.
    """
    wanted = tuple(data.linear(names))

    def work() -> dict[str, Tensor]:
        found = {name: Moments() for name in wanted}
        data.see(dict(update), wanted, lambda name, X: found[name].add(X, X))
        return {name: moments.value for name, moments in found.items()}

    return update.remember(("grams", data.serial, wanted), work)


def shrunk(G: Tensor, alpha: float) -> Tensor:
    """G with everything off its diagonal times alpha."""
    return alpha * G + (1 - alpha) * torch.diag(G.diagonal())


def regression(deltas: Sequence[Tensor], Gs: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    """`(sum_i f_i dW_i G_i) (sum_i G_i)^-1`; where no input ever points, the mean of f_i dW_i.

    Args:
        deltas: (out, in) each.
        Gs: (in, in) each.
        factors: One factor f_i per model.
    """
    targets = [f * dW.double() @ G for f, dW, G in zip(factors, deltas, Gs, strict=True)]
    mean = sum(f * dW.double() for f, dW in zip(factors, deltas, strict=True)) / len(deltas)
    return solved(torch.stack(targets).sum(0), torch.stack(list(Gs)).sum(0), torch.as_tensor(mean))


def solved(target: Tensor, G: Tensor, otherwise: Tensor) -> Tensor:
    """`target @ G^-1`, drawn to `otherwise` in directions in which G is zero.

    Args:
        target: (out, in), float64.
        G: (in, in) symmetric and positive semidefinite, float64.
        otherwise: (out, in), float64.
    """
    ridge = RIDGE * G.diagonal().mean().clamp_min(1e-30)
    right = (target + ridge * otherwise).T
    whole = G + ridge * torch.eye(len(G)).to(G)
    found: Tensor = torch.linalg.solve(whole, right).T
    return found.float()
