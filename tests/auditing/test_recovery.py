"""Tier T5: choices by brute force on made-up candidates, and all of it on pico releases."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from auditing.test_ledger import same
from trap2.auditing.arena import CONTROL, RELEASE, Arena
from trap2.auditing.attacker import Attacker
from trap2.auditing.audit import audit
from trap2.auditing.bootstrap import Bootstrap
from trap2.auditing.candidate import choose
from trap2.auditing.ledger import Ledger
from trap2.auditing.recovery import METHODS, Trainer, check_budget, recovery
from trap2.auditing.verdict import retained_skill
from trap2.errors import UserError
from trap2.recipes import AttackerSpec, AuditSpec
from trap2.schema import Report

T5 = {
    "attacks": ["task_arithmetic"],
    "t3_attacks": [],
    "relabel_rows": [6],
    "recovery": [*METHODS],
    "recovery_rows": [6, 12],
    "recovery_steps": [1, 3],
    "recovery_coefficients": [0.5, 1.0],
}

OTHERWISE = {"recovery_learning_rate": 0.02}


def made_up(coefficient, gain, test, partner):
    """A candidate whose accuracies are given: on the side, and on the one partner."""
    table = {("release", "validation"): gain, ("release", "test"): test}
    return SimpleNamespace(
        coefficient=coefficient,
        accuracy=lambda m, split: table.get((m, split), partner),
        scores=lambda split: (np.arange(100) < round(100 * test)).astype(float),
    )


@pytest.mark.parametrize(
    ("candidates", "expected"),
    [
        ([(0.5, 0.6, 0.61, 0.8), (1.0, 0.9, 0.91, 0.7)], (0.5, True, 0.61, 0.91)),
        ([(0.5, 0.6, 0.61, 0.8), (1.0, 0.9, 0.91, 0.76)], (1.0, True, 0.91, 0.91)),
        ([(0.5, 0.6, 0.61, 0.1), (1.0, 0.5, 0.91, 0.1)], (0.5, False, 0.61, 0.61)),
    ],
)
def test_the_best_candidate_that_counts_is_taken(candidates, expected):
    choice = choose([made_up(*c) for c in candidates], "release", {"b": 0.8}, 0.95)
    found = (choice.coefficient, choice.admissible, choice.accuracy, choice.unconstrained)
    assert found == expected
    assert choice.scores.mean() == choice.accuracy


@pytest.fixture(scope="module")
def report(shelf) -> Report:
    return audit(AuditSpec.model_validate(shelf.audit("lora", **T5)))


def test_every_method_has_a_point_for_every_budget(report):
    found = [(p.method, p.budget_rows, p.budget_steps) for p in report.recovery]
    trained = [
        (method, rows, steps)
        for method in ("finetune_before", "finetune_after", "distil")
        for rows in (6, 12)
        for steps in (1, 3)
    ]
    assert found == [("probe", 6, 0), ("probe", 12, 0), *trained]
    for p in report.recovery:
        assert p.retained == retained_skill(p.accuracy, p.without_release, p.standalone)
        assert p.control_retained == retained_skill(
            p.control_accuracy, p.control_without_release, p.control_standalone
        )
        assert set(p.partners) == {"b"}
        if not p.admissible:
            assert p.retained == 0
        if p.method != "probe":
            assert p.standalone == report.references.standalone
        assert p.reference == (p.method == "distil")
        for share, interval in ((p.retained, p.interval), (p.control_retained, p.control_interval)):
            assert interval[0] - 1e-6 <= share <= interval[1] + 1e-6


def test_the_tier_counts_what_is_no_reference(report):
    counted = [p for p in report.recovery if not p.reference]
    attacks = [a for a in report.attacks if a.tier == "T5"]
    assert [(a.name, a.relabel_rows, a.params["steps"]) for a in attacks] == [
        (p.method, p.budget_rows, p.budget_steps) for p in counted
    ]
    assert [(a.interval, a.control_interval) for a in attacks] == [
        (p.interval, p.control_interval) for p in counted
    ]
    low, high = report.tiers["T5"].interval
    assert low <= min(1 - a.interval[1] for a in report.attacks) + 1e-6
    assert low - 1e-6 <= report.tiers["T5"].unmergeability <= high + 1e-6
    assert set(report.tiers["T5"].by_rows) == {"6", "12"}
    assert report.tiers["T5"].unmergeability == pytest.approx(
        1 - max(a.retained for a in report.attacks)
    )
    assert not [limit for limit in report.limits if "was not tested here" in limit]


def test_an_audit_without_them_costs_and_says_nothing_of_them(reports):
    assert reports["lora"].recovery == []
    assert "T5" not in reports["lora"].tiers
    assert len([limit for limit in reports["lora"].limits if "not tested here" in limit]) == 3


def trainer(shelf, **changes) -> Trainer:
    arena = Arena(AuditSpec.model_validate(shelf.audit("lora", **{**T5, **changes})))
    return Trainer(Attacker(arena, RELEASE))


def test_training_starts_at_the_release_and_its_loss_falls(shelf):
    one = trainer(shelf, recovery_steps=[1, 80])
    member = one.arena.members[RELEASE]
    before = {n: v.clone() for n, v in one.arena.encoder.state_dict().items()}
    steps = dict(one.training(dict(one.own(True)), 12))
    assert list(steps) == [1, 80]
    for name, delta in one.own(True).items():  # one step of Adam moves by the learning rate
        assert float((steps[1][name] - delta).abs().max()) <= 1.1e-4
    losses = []
    for vector in (one.own(True), steps[80]):
        with one.arena.live.merged(vector.items()):
            found = member.evaluators["validation"]()
        losses.append(float(F.cross_entropy(found.logits[:12], found.labels[:12])))
    assert losses[1] < losses[0]
    assert all(torch.equal(v, before[n]) for n, v in one.arena.encoder.state_dict().items())


def test_without_the_release_nothing_of_it_is_used(shelf):
    one = trainer(shelf)
    assert not any(delta.any() for delta in one.own(False).values())
    assert set(one.own(False)) == set(one.own(True))
    (probe,) = METHODS["probe"](one, 6, False)
    partner = one.arena.members["b"].vector
    merged = dict(probe[1][1]._deltas())
    assert all(torch.equal(merged[n], partner[n]) for n in partner)


def test_rows_used_up_do_not_choose(shelf):
    one = trainer(shelf)
    alone = one.alone(6, False)
    found = one.arena.evaluate(one.arena.alone(RELEASE), RELEASE, "validation")
    rest = (found.logits[6:].argmax(1) == found.labels[6:]).float().mean()
    assert alone.accuracy(RELEASE, "validation") == pytest.approx(float(rest))
    test = one.arena.evaluate(one.arena.alone(RELEASE), RELEASE, "test")
    assert alone.accuracy(RELEASE, "test") == test.accuracy


def test_without_a_control_the_release_is_the_same(shelf, report):
    settings = shelf.audit("lora", **{**T5, "recovery": ["probe"]})
    del settings["control"]
    arena = Arena(AuditSpec.model_validate(settings))
    points, retained = recovery({RELEASE: Attacker(arena, RELEASE)}, Bootstrap(arena))
    assert {*retained} == {RELEASE}
    assert CONTROL not in arena.sides
    assert [p.control_accuracy for p in points] == [None, None]
    assert [p.accuracy for p in points] == [p.accuracy for p in report.recovery[:2]]


def test_budgets_that_leave_no_rows_to_choose_by_are_refused():
    spec = AttackerSpec(recovery=["probe"], recovery_rows=[30, 100])
    with pytest.raises(UserError, match="recovery_rows=100 leaves none of 100 validation rows to"):
        check_budget(spec, 100)
    check_budget(spec, 101)
    check_budget(AttackerSpec(), 10)


def test_nothing_is_trained_twice(shelf, tmp_path, report, monkeypatch):
    """Killed in the middle of training, then killed again, then run to its end, then once more."""
    spec, taught, real = AuditSpec.model_validate(shelf.audit("lora", **T5)), [], Trainer.training

    def training(trainer, start, rows, imitate=False):
        taught.append(rows)
        for found in real(trainer, start, rows, imitate):
            if len(taught) in kills:
                kills.remove(len(taught))
                raise KeyboardInterrupt
            yield found

    kills = [9, 20]
    monkeypatch.setattr(Trainer, "training", training)
    whole = 2 * 2 * (2 + 2 * 2 + 1)  # sides, budgets; before (with, without), after (at c), distil
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), Ledger(tmp_path) as ledger:
            audit(spec, ledger=ledger)
    with Ledger(tmp_path) as ledger:
        assert same(audit(spec, ledger=ledger), report)
        assert whole < len(taught) <= whole + 4  # what was cut short begins anew
        taught.clear()
        assert same(audit(spec, ledger=ledger), report)
        assert taught == []
        other = AuditSpec.model_validate(shelf.audit("lora", **{**T5, **OTHERWISE}))
        found = audit(other, ledger=ledger)
    assert len(taught) >= whole
    assert [p.accuracy for p in found.recovery] != [p.accuracy for p in report.recovery]
