"""AdaMerging: coefficients that make the merged model sure of its answers on unlabelled rows."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trap2.attacks.attack import attack
from trap2.attacks.unlabelled import Batch, Unlabelled
from trap2.attacks.vectors import TaskVector, by_tensor


@attack(
    "adamerging",
    paper="https://arxiv.org/abs/2310.02575",
    grid={"layerwise": (False, True), "steps": (100,), "learning_rate": (0.01,)},
    coefficients=(0.0, 0.3, 0.6, 1.0),
)
def adamerging(
    updates: Sequence[TaskVector],
    coefficients: Sequence[float],
    *,
    data: Sequence[Unlabelled],
    layerwise: bool,
    steps: int,
    learning_rate: float = 0.01,
) -> Iterator[tuple[str, Tensor]]:
    """Coefficients by entropy minimisation (Yang et al. 2024, arXiv 2310.02575).

    Symbols: dW_i(l) tensor l of the update of model i; c_i coefficient; x rows of model j, read
    with its own head; H entropy of the answer.

        dW(l) = sum_i lambda_i(l) dW_i(l)        lambda_i(l) starts at c_i
        lambda minimises sum_j mean_x H(p_j(y | x; W0 + dW)), by Adam

    `layerwise` gives every tensor of every model a lambda, otherwise every model has one. The paper
    takes 1000 steps at a learning rate of 0.001; here are a tenth of the steps at ten times the
    rate. A model with coefficient 0 is left out. Without steps it is task arithmetic.

    Args:
        updates: One task vector per model.
        coefficients: One coefficient per model.
        data: Unlabelled rows of each model.
        layerwise: Whether every tensor has a coefficient of its own.
        steps: Steps of Adam, one batch of each model in each.
        learning_rate: Of Adam.

    Yields:
        (base tensor name, merged update).
    """
    held = [i for i, c in enumerate(coefficients) if c]
    whole = {n: [deltas[i] for i in held] for n, deltas in by_tensor(updates)}
    shape = (len(held), len(whole) if layerwise else 1)
    lambdas = torch.tensor([coefficients[i] for i in held]).reshape(-1, 1).repeat(1, shape[1])
    lambdas.requires_grad_(bool(held))

    def merged() -> dict[str, Tensor]:
        places = enumerate(whole.items())
        return {
            name: sum(
                (lam * dW for lam, dW in zip(lambdas[:, k % shape[1]], deltas, strict=True)),
                start=torch.zeros(()),
            )
            for k, (name, deltas) in places
        }

    optimizer = torch.optim.Adam([lambdas], lr=learning_rate)
    turns = [_turns(data[i]) for i in held]
    for _ in range(steps if held else 0):
        optimizer.zero_grad()
        deltas = merged()
        unsure = [
            entropy(data[i].logits(deltas, next(turn))) for i, turn in zip(held, turns, strict=True)
        ]
        torch.autograd.backward(unsure)
        optimizer.step()
    with torch.no_grad():
        found = merged()
    for name, zeros in by_tensor(updates):
        yield name, found[name].expand_as(zeros[0])


def entropy(logits: Tensor) -> Tensor:
    """Mean entropy of the answers, in nats.

    Args:
        logits: (N, C).
    """
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean()


def _turns(data: Unlabelled) -> Iterator[Batch]:
    while True:
        yield from data.batches()
