"""The scale curve of one release: the audit's own numbers, without an attacker."""

import pytest
import torch

from trap2.auditing.sweep import scale_point, sweep
from trap2.errors import UserError
from trap2.tasks.evaluation import Classification
from trap2.taskspec import TaskSpec


def task_of(shelf, kind):
    return TaskSpec.model_validate(shelf.task("a", kind == "lora"))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_sweep_gives_the_audits_curve_point_by_point(reports, shelf, kind):
    heard = []
    points = sweep(
        shelf.release(kind, "release"),
        str(shelf.base),
        task_of(shelf, kind),
        [1.5, 0.0, 0.5, 1.0],
        rows=24,
        seed=3,
        say=heard.append,
    )
    assert heard == points
    assert [point.s for point in points] == [1.5, 0.0, 0.5, 1.0]
    expected = {point.s: point for point in reports[kind].scale_curve}
    for point in points:
        assert point.accuracy == expected[point.s].accuracy
        assert point.loss == pytest.approx(expected[point.s].loss, rel=1e-5)


def test_no_rows_and_no_number_are_refused(shelf):
    arguments = (shelf.release("lora", "release"), str(shelf.base), task_of(shelf, "lora"))
    with pytest.raises(UserError, match="rows=0 leaves nothing to evaluate on; give 1 or more"):
        sweep(*arguments, [1.0], rows=0)
    with pytest.raises(UserError, match="at scale nan the loss is nan; use finite scales"):
        sweep(*arguments, [float("nan")], rows=4)


def test_a_point_holds_share_and_nats():
    logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    point = scale_point(0.5, Classification(logits, torch.tensor([0, 1])))
    assert (point.s, point.accuracy) == (0.5, 0.5)
    assert point.loss == pytest.approx((0.126928 + 0.693147) / 2, abs=1e-5)
