"""Which checkpoint to release: the one that is worth most to its author and least in a merge.

A checkpoint scores its validation accuracy at s = 1 minus a price for the share of its skill, its
points above the base model, that re-labelling still finds off s = 1: `WORTH` for all of it, counted
up to half, for with more the trap is open, and among checkpoints with an open trap only their use
counts. So a trap that closes is worth ten points at most, however much skill there is to hide. A
control has no trap, and only its accuracy counts.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from trap2.errors import TrainingStopped
from trap2.protecting.scaled import LiveUpdate
from trap2.statistics import Batches, recomputed, recount
from trap2.tasks.evaluate import Evaluator
from trap2.tasks.relabel import readable_accuracy

PROBED_SCALES = (0.5, 0.8)
"""Scales at which a checkpoint's leak is read: where merges put an update, far and near."""


OPEN = 0.5
"""Share of the skill, re-labelled, above which a trap did not close: it is nearly all or none."""


WORTH = 0.2
"""Accuracy that may be given for hiding all of the skill."""


@dataclass(frozen=True)
class Candidate:
    """Validation scores of one checkpoint, accuracies as fractions.

    Attributes:
        step: Optimizer step.
        utility: Accuracy at s = 1.
        leak: Best re-labelled accuracy over the probed scales; None for a control.
        base_leak: The same read-out on the base model: nothing can go below it for free.
    """

    step: int
    utility: float
    leak: float | None
    base_leak: float

    @property
    def score(self) -> float:
        """Utility minus the price of the skill that leaks, as far as that makes a difference."""
        leaking, skill = (self.leak or 0.0) - self.base_leak, self.utility - self.base_leak
        if leaking <= 0 or skill <= 0:
            return self.utility
        return self.utility - WORTH * min(leaking / skill, OPEN)

    def record(self) -> dict[str, float | int | None]:
        """For `trap2.json`."""
        return {**asdict(self), "score": self.score}


def judge(
    update: LiveUpdate,
    evaluator: Evaluator,
    step: int,
    base_leak: float,
    control: bool,
    counted_on: Batches = (),
) -> Candidate:
    """Score the model in training on validation rows; its weights and mode are left as they were.

    Running statistics become those of `counted_on`, and at other scales they are counted there too,
    as whoever merges counts them.

    Args:
        update: The update in training.
        evaluator: The model on validation rows.
        step: Optimizer step.
        base_leak: Re-labelled accuracy of the base model on the same rows.
        control: Whether there is no trap to judge.
        counted_on: Training rows; none where training leaves running statistics alone.

    Raises:
        TrainingStopped: The weights broke: an output at s = 1 is NaN or infinite.
    """
    recount(update.model, counted_on)
    result = evaluator()
    if not bool(torch.isfinite(result.outputs).all()):
        raise TrainingStopped(
            f"the outputs hold NaN or infinity after step {step}; training stopped: lower the "
            "learning rate or the strength"
        )
    utility = result.accuracy
    if control:
        return Candidate(step, utility, None, base_leak)
    leaks = []
    for s in PROBED_SCALES:
        with update.at(s), recomputed(update.model, counted_on):
            leaks.append(readable_accuracy(evaluator()))
    return Candidate(step, utility, max(leaks), base_leak)


def open_trap(chosen: Mapping[str, Any]) -> str:
    """Say that a checkpoint is hardly protected; nothing where its trap closed, or it has none.

    Args:
        chosen: The record of a `Candidate`, as in `trap2.json`.
    """
    leak, base, utility = (chosen[key] for key in ("leak", "base_leak", "utility"))
    if leak is None or leak - base <= OPEN * max(0.0, utility - base):
        return ""
    scales = " or ".join(f"{s:g}" for s in PROBED_SCALES)
    return (
        f"the trap did not close: at scale {scales} re-labelled outputs are right in "
        f"{100 * leak:.1f} % of the validation rows (as released {100 * utility:.1f} %, base "
        f"{100 * base:.1f} %), so a merge may keep the skill; train more steps, on larger batches, "
        "or with a larger trap2.fraction"
    )
