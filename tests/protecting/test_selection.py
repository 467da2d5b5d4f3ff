"""Which checkpoint is released: utility, less what leaks above the base if the trap closed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from trap2.errors import TrainingStopped
from trap2.protecting.callbacks import BestCandidate
from trap2.protecting.scaled import LiveUpdate
from trap2.protecting.selection import (
    OPEN,
    PROBED_SCALES,
    WORTH,
    Candidate,
    judge,
    open_trap,
)
from trap2.tasks.evaluation import Classification

SHARES = st.floats(0, 1)


@given(utility=SHARES, leak=SHARES, base=SHARES)
def test_a_score_lies_between_utility_and_ten_points_less(
    utility: float, leak: float, base: float
) -> None:
    candidate = Candidate(3, utility, leak, base)
    assert utility - WORTH * OPEN - 1e-12 <= candidate.score <= utility
    if open_trap(candidate.record()) and utility > base:
        assert candidate.score == pytest.approx(utility - WORTH * OPEN)
    elif utility > base:
        share = max(0.0, leak - base) / (utility - base)
        assert candidate.score == pytest.approx(utility - WORTH * share)
    assert Candidate(3, utility, None, base).score == utility
    assert candidate.record() == {
        "step": 3,
        "utility": utility,
        "leak": leak,
        "base_leak": base,
        "score": candidate.score,
    }


def test_a_leak_above_the_base_lowers_the_score_and_one_below_wins_nothing() -> None:
    scores = [Candidate(1, 0.9, leak, 0.5).score for leak in (0.2, 0.5, 0.6, 0.7, 0.9)]
    assert scores == pytest.approx([0.9, 0.9, 0.85, 0.8, 0.8])


def test_a_half_open_trap_is_not_bought_with_more_points_than_it_is_worth() -> None:
    """MobileNetV2 on `kmnist10k`: the earlier one leaks less and knows less."""
    half, later = Candidate(600, 0.923, 0.57, 0.38), Candidate(1200, 0.98, 0.75, 0.38)
    assert best_of(half, later) == 1200
    assert best_of(Candidate(600, 0.923, 0.38, 0.38), later) == 600


def test_among_open_traps_the_most_useful_one_is_chosen_and_a_closed_one_before_them() -> None:
    early, late = Candidate(5, 0.923, 0.85, 0.377), Candidate(15, 0.983, 0.933, 0.377)
    closed, lost = Candidate(10, 0.90, 0.40, 0.377), Candidate(9, 0.377, 0.3, 0.377)
    assert best_of(early, late) == 15
    assert best_of(early, lost, late) == 15
    assert best_of(early, closed, lost, late) == 10


def best_of(*history: Candidate) -> int:
    best = BestCandidate(None, cast(Any, None), 0.0, 1, Path())
    best.history = list(history)
    return best.chosen.step


def test_the_best_score_is_chosen_and_the_later_one_on_a_tie() -> None:
    leaking, late = Candidate(8, 0.88, 0.86, 0.5), Candidate(6, 0.8, 0.5, 0.5)
    early = Candidate(2, 0.8, 0.4, 0.5)
    assert best_of(early, late, leaking) == 6
    assert best_of(leaking, late, early) == 6
    assert best_of(early, Candidate(4, 0.81, None, 0.5)) == 4


def test_where_nothing_is_protected_the_most_useful_one_is_chosen() -> None:
    weak, useful, weaker = (
        Candidate(step, utility + noise, utility, 0.55)  # single precision against double
        for step, utility, noise in ((2, 0.92, 1e-8), (4, 0.957, -1e-8), (6, 0.953, 0.0))
    )
    assert best_of(weak, useful, weaker) == 4


def test_a_trap_that_did_not_close_is_said_in_numbers() -> None:
    assert open_trap(Candidate(9, 0.84, 0.66, 0.47).record()) == (
        "the trap did not close: at scale 0.5 or 0.8 re-labelled outputs are right in 66.0 % of "
        "the validation rows (as released 84.0 %, base 47.0 %), so a merge may keep the skill; "
        "train more steps, on larger batches, or with a larger trap2.fraction"
    )


@pytest.mark.parametrize(
    "closed",
    [
        Candidate(9, 0.84, 0.65, 0.47),  # under half of the skill
        Candidate(9, 0.84, None, 0.47),  # a control
        Candidate(9, 0.40, 0.47, 0.47),  # no skill at all
    ],
)
def test_nothing_is_said_of_a_trap_that_closed_or_of_none(closed: Candidate) -> None:
    assert open_trap(closed.record()) == ""


class Scales:
    """Stands for an update: remembers the scale the model is at."""

    def __init__(self) -> None:
        self.now, self.seen, self.model = 1.0, list[float](), nn.Linear(1, 1)

    @contextmanager
    def at(self, s: float) -> Iterator[None]:
        self.now = s
        self.seen.append(s)
        yield
        self.now = 1.0


def rows_at(update: Scales, skill: dict[float, float]) -> Any:
    """An evaluator whose outputs hold a share of skill at each scale, and noise beyond it."""
    labels = torch.arange(120) % 3

    def evaluate() -> Classification:
        noise = torch.randn(120, 3, generator=torch.Generator().manual_seed(0))
        knows = torch.arange(120) < 120 * skill[update.now]
        return Classification(noise + 50 * knows[:, None] * torch.eye(3)[labels.roll(0)], labels)

    evaluate.labels = labels  # type: ignore[attr-defined]
    return evaluate


def test_the_worst_probed_scale_is_the_leak() -> None:
    update = Scales()
    far, near = PROBED_SCALES
    candidate = judge(
        cast(Any, update), rows_at(update, {1.0: 1.0, far: 0.0, near: 0.9}), 5, 0.4, control=False
    )
    assert update.seen == [far, near]
    assert update.now == 1.0
    assert candidate.step == 5
    assert candidate.utility == 1.0
    assert candidate.leak is not None
    assert candidate.leak > 0.85
    assert candidate.score == pytest.approx(0.9)  # open


def test_a_control_is_judged_by_its_utility_only() -> None:
    update = Scales()
    candidate = judge(cast(Any, update), rows_at(update, {1.0: 1.0}), 5, 0.4, control=True)
    assert update.seen == []
    assert candidate == Candidate(5, 1.0, None, 0.4)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_broken_weights_are_no_candidate(broken: float) -> None:
    logits = torch.zeros(4, 3)
    logits[2, 1] = broken
    result = Classification(logits, torch.zeros(4, dtype=torch.long))
    evaluator = SimpleNamespace(__call__=lambda: result, labels=result.labels)
    with pytest.raises(TrainingStopped) as caught:
        judge(cast(Any, Scales()), cast(Any, evaluator.__call__), 7, 0.4, control=True)
    assert str(caught.value) == (
        "the outputs hold NaN or infinity after step 7; training stopped: lower the learning rate "
        "or the strength"
    )


def test_statistics_are_counted_anew_for_the_checkpoint_and_at_every_probed_scale() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).train()
    update = LiveUpdate(model)
    with torch.no_grad():
        model[0].weight.mul_(5.0)  # the running statistics know nothing of it
    rows = torch.randn(40, 2, generator=torch.Generator().manual_seed(1))
    seen: list[Tensor] = []

    def evaluate() -> Classification:
        model.eval()
        with torch.no_grad():
            seen.append(model(rows))
        model.train()
        return Classification(seen[-1], (rows[:, 0] > 0).long())

    counted_on = [{"input": rows[:20]}, {"input": rows[20:]}]
    judge(update, cast(Any, evaluate), 5, 0.0, control=False, counted_on=counted_on)
    with torch.no_grad():
        for s, outputs in zip((1.0, *PROBED_SCALES), seen, strict=True):
            with update.at(s):
                inner = model[0](rows)
            halves = inner.view(2, 20, 2)
            mean, variance = halves.mean(1).mean(0), halves.var(1).mean(0)
            torch.testing.assert_close(outputs, (inner - mean) / (variance + 1e-5).sqrt())
        inner = model[0](rows)
    torch.testing.assert_close(model[1].running_mean, inner.view(2, 20, 2).mean(1).mean(0))
    assert model.training
