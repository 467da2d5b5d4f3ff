"""Merging layer by layer: every linear layer is merged knowing what reaches it in the merged model.

Symbols: X_i (tokens, in) inputs of one linear layer in model i on its own rows; H_i the same rows'
inputs of that layer in the merged model, whose layers before it are merged already.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trap2.attacks.gram import Moments
from trap2.attacks.unlabelled import Batch, Deltas, Unlabelled
from trap2.attacks.vectors import TaskVector, by_tensor, weighted_sum


@dataclass(frozen=True)
class Layer:
    """What is known of one linear layer when its turn comes, one entry per model.

    Attributes:
        base: W0 (out, in).
        deltas: dW_i (out, in).
        factors: Coefficients c_i.
        merged: H_i'H_i / tokens (in, in).
        crossed: X_i'H_i / tokens (in, in), if it was asked for.
    """

    base: Tensor
    deltas: list[Tensor]
    factors: list[float]
    merged: list[Tensor]
    crossed: list[Tensor]


def chained(
    updates: Sequence[TaskVector],
    coefficients: Sequence[float],
    data: Sequence[Unlabelled],
    solve: Callable[[Layer], Tensor],
    crossed: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """Merge all tensors: linear layers in the order in which they run, everything else before.

    Layers with one and the same input (queries, keys and values) are merged together. What is no
    linear layer, or never runs, is averaged: `1/N sum_i c_i dW_i`. A model with coefficient 0 is
    left out.

    Args:
        updates: One task vector per model.
        coefficients: One coefficient per model.
        data: Unlabelled rows of each model.
        solve: From what is known of a layer to its merged update.
        crossed: Whether it needs the inputs in the models themselves, a second run of each.

    Yields:
        (base tensor name, merged update).
    """
    held = [i for i, c in enumerate(coefficients) if c]
    whole = dict(by_tensor(updates))
    factors = [c / max(1, len(held)) for c in coefficients]
    groups = _groups(data[held[0]], whole) if held else []
    late = {name for group in groups for name in group}
    done = {n: weighted_sum(deltas, factors) for n, deltas in whole.items() if n not in late}
    for group in groups:
        found = [
            _moments(dict(updates[i]) if crossed else None, done, data[i], group[0]) for i in held
        ]
        for name in group:
            layer = Layer(
                base=data[held[0]].base(name),
                deltas=[whole[name][i] for i in held],
                factors=[coefficients[i] for i in held],
                merged=[square for square, _ in found],
                crossed=[both for _, both in found],
            )
            done[name] = solve(layer)
    for name in whole:
        yield name, done[name]


def _groups(data: Unlabelled, names: dict[str, list[Tensor]]) -> list[list[str]]:
    """Linear layers in the order in which they run, those that share their input together."""
    found: dict[int, list[str]] = {}
    seen: list[Tensor] = []

    def note(name: str, inputs: Tensor) -> None:
        place = next((k for k, other in enumerate(seen) if torch.equal(other, inputs)), len(seen))
        if place == len(seen):
            seen.append(inputs)
        if all(name not in group for group in found.values()):
            found.setdefault(place, []).append(name)

    data.see({}, data.linear(names), note, [next(data.batches())])
    return list(found.values())


def _moments(
    own: Deltas | None, merged: Deltas, data: Unlabelled, name: str
) -> tuple[Tensor, Tensor]:
    """H'H and, for the model's `own` update, X'H of one layer, over the tokens of all rows."""
    square, crossed = Moments(), Moments()
    for batch in data.batches():
        H = _inputs(merged, data, name, batch)
        square.add(H, H)
        if own is not None:
            crossed.add(_inputs(own, data, name, batch), H)
    return square.value, crossed.value


def _inputs(deltas: Deltas, data: Unlabelled, name: str, batch: Batch) -> Tensor:
    """What goes into one layer at W0 + dW, (tokens, in)."""
    seen: list[Tensor] = []
    data.see(deltas, [name], lambda _, inputs: seen.append(inputs), [batch], once=True)
    return seen[0]
