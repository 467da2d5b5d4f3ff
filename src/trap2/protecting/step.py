"""The idea, on one screen: one protected training step.

    minimise  L(W0 + dW) + strength * E_s[ w(s) * trap(W0 + s * dW) ],    s != 1

or, with surrogate partners beside it, s = 1 too (`surrogates.py`).

Symbols: W0 base weights; dW update in training; s scale; w(s) weight of a scale; L task loss.
`trap` is one of `losses.py` (the paper's own, arXiv 2601.21898, is trap = -L).

The second term runs forward *and* backward with the parameters held at W0 + s*dW and the same
dropout masks; its gradient adds up in `.grad` beside the nominal one. Clipping, unscaling and the
optimizer step stay the user's own.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from trap2.errors import TrainingStopped
from trap2.protecting.cap import Pressure
from trap2.protecting.config import Trap2Config
from trap2.protecting.keeping import Keeper
from trap2.protecting.scaled import LiveUpdate
from trap2.protecting.surrogates import Mix, Surrogates


@dataclass(frozen=True)
class StepRecord:
    """One step: nominal loss, trap loss (None while there is no trap), and its scales.

    `dropped` counts the trap passes that were not finite and left no gradient; `trap` is the mean
    over the others. `pressure` is what the cap saw of their gradients, if there is one.
    """

    nominal: float
    trap: float | None
    scales: tuple[float, ...]
    dropped: int = 0
    pressure: Pressure | None = None


def trap_step(
    nominal: Callable[[], Tensor],
    scaled: Callable[[int, float, float], Tensor],
    *,
    update: LiveUpdate,
    config: Trap2Config,
    step: int,
    keeper: Keeper | None = None,
    surrogates: Surrogates | None = None,
) -> StepRecord:
    """Run one step's forward and backward passes; the gradients are left in `.grad`.

    Args:
        nominal: Runs the user's own forward and backward; returns the loss.
        scaled: `scaled(part, place, factor)` runs forward and backward of `factor * trap` on the
            rows of one part (of `config.scales_per_step`) and returns the trap loss. The place is
            that of the `Mix`; the factor holds the trap's weight and the chain rule's.
        update: The update in training.
        config: Settings.
        step: Index of the optimizer step; the same for all micro-batches of one step.
        keeper: Caps the trap's gradients and drops those that are not finite; without it they stop
            training.
        surrogates: Partners that stand beside the update in a share of the trap passes.

    Raises:
        TrainingStopped: A loss is NaN or infinite; the optimizer has not stepped.
    """
    replay = _replayer(update)  # the scaled pass sees the nominal pass's dropout masks
    strength = config.strength_at(step) * (keeper.easing.factor if keeper else 1.0)
    law, passes = config.law_at(step), config.passes_at(step)
    if passes == 0:
        return StepRecord(finite(nominal(), "nominal loss", step), None, ())
    with keeper.listening() if keeper else nullcontext():
        loss = nominal()
    scales = law.draw(config.scale_seed, step, passes)
    mixes = [surrogates.mix(step, *p) if surrogates else Mix(p[1]) for p in enumerate(scales)]
    traps = []
    for part, mix in enumerate(mixes):
        with replay(), ExitStack() as stack:
            added = surrogates.added(mix) if surrogates else ()
            chain = stack.enter_context(update.at(mix.s, added))
            stack.enter_context(update.frozen_statistics())
            stack.enter_context(keeper.holding() if keeper else nullcontext())
            trap = scaled(part, mix.place, strength * law.weight(mix.s) / len(mixes) * chain)
            found = finite(loss, "nominal loss", step)  # not before: to read it waits for a GPU
        if keeper is None or keeper.guard.sound:
            traps.append(finite(trap, "trap loss", step))
    mean = sum(traps) / len(traps) if traps else None
    drawn, dropped = tuple(mix.s for mix in mixes), len(mixes) - len(traps)
    return StepRecord(found, mean, drawn, dropped, keeper.cap.pressure if keeper else None)


def finite(loss: Tensor, what: str, step: int) -> float:
    """The value of a loss.

    Raises:
        TrainingStopped: It is NaN or infinite.
    """
    value = float(loss.detach())
    if not math.isfinite(value):
        raise TrainingStopped(
            f"{what} is {value} at step {step}; training stopped before the weights took it: "
            "lower the learning rate or the strength and start again"
        )
    return value


def _replayer(update: LiveUpdate) -> Callable[[], AbstractContextManager[None]]:
    """Make a context that replays the random stream from here and then puts the stream back."""
    device = update.device
    cards = [device.index or 0] if device.type == "cuda" else []
    host = torch.get_rng_state()
    states = [torch.cuda.get_rng_state(card) for card in cards]

    @contextmanager
    def replay() -> Iterator[None]:
        with torch.random.fork_rng(devices=cards):
            torch.set_rng_state(host)
            for card, state in zip(cards, states, strict=True):
                torch.cuda.set_rng_state(state, card)
            yield

    return replay
