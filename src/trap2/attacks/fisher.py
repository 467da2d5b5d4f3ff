"""Fisher merging: a weighted mean, where a weight counts as much as its model depends on it."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from trap2.attacks.attack import attack
from trap2.attacks.unlabelled import Unlabelled
from trap2.attacks.vectors import TaskVector, by_tensor

FLOOR = 1e-6
"""Least importance of a weight, as a share of the mean: where no model cares, the plain mean."""


@attack(
    "fisher",
    paper="https://arxiv.org/abs/2111.09832",
    grid={"seed": (0,)},
    coefficients=(0.0, 0.5, 1.0, 1.5, 2.0, 3.0),
)
def fisher(
    updates: Sequence[TaskVector],
    coefficients: Sequence[float],
    *,
    data: Sequence[Unlabelled],
    seed: int = 0,
) -> Iterator[tuple[str, Tensor]]:
    """Weighting by the diagonal Fisher information (Matena & Raffel 2022, arXiv 2111.09832).

    Symbols: W_i = W0 + dW_i; x rows of model i; y an answer drawn from the model's own, so that no
    labels are needed; F_i (per entry) diagonal Fisher information; c_i coefficient.

        F_i = mean_x (d log p(y|x; W_i) / dW)^2,    divided by its mean over all entries
        dW  = sum_i c_i F_i dW_i / sum_i F_i

    The paper weights whole models by hand where their Fisher information differs in size; here all
    are of mean 1. A model with coefficient 0 is left out. One model at c = 1 is that model.

    Args:
        updates: One task vector per model.
        coefficients: One coefficient per model.
        data: Unlabelled rows of each model.
        seed: Seed of the drawn answers.

    Yields:
        (base tensor name, merged update).
    """
    names = tuple(name for name, _ in by_tensor(updates))
    held = [i for i, c in enumerate(coefficients) if c]
    found = [importance(updates[i], data[i], names, seed) for i in held]
    for name, deltas in by_tensor(updates):
        merged, total = torch.zeros_like(deltas[0]), torch.full_like(deltas[0], 1e-30)
        for i, weights in zip(held, found, strict=True):
            merged = merged + coefficients[i] * weights[name] * deltas[i]
            total = total + weights[name]
        yield name, merged / total


def importance(
    update: TaskVector, data: Unlabelled, names: tuple[str, ...], seed: int
) -> dict[str, Tensor]:
    """F of a model at W0 + dW on its own rows, of mean 1 and at least the floor; remembered.

    Args:
        update: Its update.
        data: Its rows.
        names: Tensors wanted; those it does not change included.
        seed: Seed of the drawn answers.
    """

    def work() -> dict[str, Tensor]:
        known = dict(update)
        at = {n: known.get(n, torch.zeros_like(data.base(n))).requires_grad_() for n in names}
        squares = {name: torch.zeros_like(delta) for name, delta in at.items()}
        generator = torch.Generator().manual_seed(seed)
        for row in data.batches(size=1):
            log_p = F.log_softmax(data.logits(at, row), dim=-1)
            drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator)
            loss = log_p[0, int(drawn)]
            gradients = torch.autograd.grad(loss, list(at.values()), allow_unused=True)
            for square, gradient in zip(squares.values(), gradients, strict=True):
                if gradient is not None:
                    square.add_(gradient.square())
        entries = sum(square.numel() for square in squares.values())
        mean = float(sum(square.sum() for square in squares.values())) / entries or 1.0
        return {name: (square / mean).clamp_min(FLOOR) for name, square in squares.items()}

    return update.remember(("fisher",), work, (data.serial, names, seed))
