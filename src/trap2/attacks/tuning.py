"""Training an update by gradient descent on a few rows; the live model stays at its base.

Symbols: W0 base; dW update, all of whose entries are trained.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from trap2.attacks.unlabelled import BATCH, Deltas, Unlabelled

Loss = Callable[[Tensor, Tensor], Tensor]
"""From logits (N, C) and the rows' targets (N, ...) to a mean loss."""


def tuned(
    data: Unlabelled,
    start: Deltas,
    targets: Tensor,
    loss: Loss,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Train dW with Adam, `BATCH` rows a step, drawn anew without replacement for every epoch.

    Args:
        data: The rows.
        start: dW to start from.
        targets: One target per row, in the order of the rows.
        loss: What to minimise.
        steps: How many steps.
        learning_rate: Of Adam, constant.
        seed: Seed of the order of rows.

    Yields:
        (steps made, dW), before the first step and after every one. The tensors are the ones in
        training: copy what is kept.
    """
    at = {name: delta.detach().clone().requires_grad_() for name, delta in start.items()}
    optimizer = torch.optim.Adam(list(at.values()), lr=learning_rate)
    order = _order(data.rows, seed)
    yield 0, at
    for step in range(1, steps + 1):
        chosen = [next(order) for _ in range(min(BATCH, data.rows))]
        optimizer.zero_grad()
        torch.autograd.backward(loss(data.logits(at, data.batch(chosen)), targets[chosen]))
        optimizer.step()
        yield step, at


def _order(count: int, seed: int) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


@torch.no_grad()
def answers(data: Unlabelled, deltas: Deltas) -> Tensor:
    """Probabilities (N, C) that a model gives to the classes of all rows, in their order."""
    return torch.cat([data.logits(deltas, batch).softmax(-1) for batch in data.batches()])


def imitation(logits: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy to a teacher's probabilities: its KL divergence but for a constant.

    Args:
        logits: (N, C).
        wanted: (N, C) probabilities.
    """
    return -(wanted * logits.log_softmax(-1)).sum(-1).mean()
