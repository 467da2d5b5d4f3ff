"""ProDistill: a coefficient for every weight, learnt block by block from the models' features."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from trap2.attacks.attack import attack
from trap2.attacks.unlabelled import Deltas, Unlabelled
from trap2.attacks.vectors import TaskVector, by_tensor, weighted_sum


@dataclass(frozen=True)
class Call:
    """One batch's way through one block: what goes in in the merged model, what should come out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    wanted: Tensor


@attack(
    "prodistill",
    paper="https://arxiv.org/abs/2502.12706",
    grid={"steps": (100,), "learning_rate": (0.01,)},
    coefficients=(0.0, 0.3, 0.6, 1.0),
)
def prodistill(
    updates: Sequence[TaskVector],
    coefficients: Sequence[float],
    *,
    data: Sequence[Unlabelled],
    steps: int,
    learning_rate: float = 0.01,
) -> Iterator[tuple[str, Tensor]]:
    """Progressive layer-wise distillation (Xu et al. 2025, arXiv 2502.12706).

    Symbols: dW_i update of model i; L_i (per entry) its coefficients, starting at c_i; z_i (N, ..)
    what a transformer block gives in model i on its own rows x; h_i what goes into the block on the
    same rows in the merged model, whose blocks before it are merged already.

        dW = sum_i L_i * dW_i
        L  minimises sum_i mean |block(h_i; W0 + dW) - z_i|^2 by Adam, one block after another

    Outside the blocks L_i = c_i. The blocks are the model's longest list of modules. A model with
    coefficient 0 is left out. Without steps it is task arithmetic; with one model at c = 1 the
    error is zero from the start.

    Args:
        updates: One task vector per model.
        coefficients: One coefficient per model.
        data: Unlabelled rows of each model.
        steps: Steps of Adam for each block, one batch of each model in each.
        learning_rate: Of Adam.

    Yields:
        (base tensor name, merged update).
    """
    held = [i for i, c in enumerate(coefficients) if c]
    whole = dict(by_tensor(updates))
    done = {name: weighted_sum(deltas, coefficients) for name, deltas in whole.items()}
    for block, inside in _blocks(data[held[0]], whole) if held and steps else []:
        calls = [_calls(data[i], block, done, dict(updates[i])) for i in held]
        parts = {own: [whole[name][i] for i in held] for name, own in inside.items()}
        weights = {own: data[held[0]].base(name) for name, own in inside.items()}
        starts = [coefficients[i] for i in held]
        learnt = _learnt(block, weights, parts, starts, calls, steps, learning_rate)
        done |= {name: learnt[own] for name, own in inside.items()}
    for name in whole:
        yield name, done[name]


def _blocks(
    data: Unlabelled, names: Deltas | dict[str, Any]
) -> list[tuple[nn.Module, dict[str, str]]]:
    """The blocks in their order, each with the base tensors in it and its own names for them."""
    lists = [m for m in data.model.modules() if isinstance(m, nn.ModuleList)]
    longest = max(lists, key=len, default=nn.ModuleList())
    found = []
    for block in longest:
        owned = {p.data_ptr(): own for own, p in block.named_parameters()}
        inside = {
            n: owned[data.base(n).data_ptr()] for n in names if data.base(n).data_ptr() in owned
        }
        if inside:
            found.append((block, inside))
    return found


@torch.no_grad()
def _calls(data: Unlabelled, block: nn.Module, merged: Deltas, own: Deltas) -> list[Call]:
    """What one block gets and should give on every batch of a model."""
    calls: list[Call] = []
    seen: list[Any] = []
    hook = block.register_forward_hook(
        lambda _, args, kwargs, output: seen.append((args, kwargs, _features(output))),
        with_kwargs=True,
    )
    try:
        for batch in data.batches():
            data.logits(own, batch)
            data.logits(merged, batch)
            (_, _, wanted), (args, kwargs, _) = seen
            calls.append(Call(args, kwargs, wanted))
            seen.clear()
    finally:
        hook.remove()
    return calls


def _learnt(
    block: nn.Module,
    weights: dict[str, Tensor],
    parts: dict[str, list[Tensor]],
    starts: list[float],
    calls: list[list[Call]],
    steps: int,
    learning_rate: float,
) -> dict[str, Tensor]:
    """The merged update of one block, by the block's own names."""
    lambdas = {
        own: [torch.full_like(dW, c).requires_grad_() for dW, c in zip(deltas, starts, strict=True)]
        for own, deltas in parts.items()
    }

    def merged() -> dict[str, Tensor]:
        return {
            own: torch.stack([lam * dW for lam, dW in zip(lambdas[own], deltas, strict=True)]).sum(
                0
            )
            for own, deltas in parts.items()
        }

    optimizer = torch.optim.Adam([lam for own in lambdas.values() for lam in own], lr=learning_rate)
    for step in range(steps):
        optimizer.zero_grad()
        at = {own: weights[own] + dW for own, dW in merged().items()}
        losses = []
        for turns in calls:
            call = turns[step % len(turns)]
            given = _features(functional_call(block, at, call.args, call.kwargs))
            losses.append((given - call.wanted).square().mean())
        torch.autograd.backward(losses)
        optimizer.step()
    with torch.no_grad():
        return merged()


def _features(output: Any) -> Tensor:
    """The hidden states a block gives, whatever else comes with them."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found
