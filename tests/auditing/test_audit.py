"""A whole audit on pico models: every number in the record agrees with the others."""

import json

import pytest
from pydantic import ValidationError

import trap2
from trap2.auditing.arena import Arena
from trap2.auditing.audit import audit
from trap2.auditing.checks import raised
from trap2.auditing.verdict import TIERS, retained_skill, tier_results
from trap2.errors import UserError
from trap2.files import weights_digest
from trap2.progress import Progress
from trap2.recipes import AuditSpec
from trap2.schema import Report

KINDS = pytest.mark.parametrize("kind", ["lora", "full"])


def spec_of(shelf, kind="lora", **attacker):
    return AuditSpec.model_validate(shelf.audit(kind, **attacker))


@KINDS
def test_the_record_says_what_was_audited(reports, shelf, kind):
    report = reports[kind]
    info = report.release
    assert (info.name, info.kind, info.task, info.classes) == ("release", kind, "a", 3)
    assert (info.partners, info.base, info.has_control) == (["b"], "base", True)
    law = json.loads((shelf.release(kind, "release") / "trap2.json").read_text())["trap2"]
    assert info.trained_range == (law["low"], law["high"])
    assert info.trained_band == law["band"]
    assert (info.recipe["seed"], info.recipe["training.steps"]) == ("0", "20")
    assert info.recipe["task.classes"] == '["low", "middle", "high"]'
    assert report.seed == 3
    assert report.schema_version == 1
    assert report.rows["validation"] == report.rows["test"] == 24
    assert report.rows["evaluations"] > 0
    assert report.settings["relabel_rows"] == [6, 20]
    assert set(report.versions) >= {"trap2", "torch", "transformers", "python"}
    assert report.digests == {
        "base": weights_digest(shelf.base),
        "release": weights_digest(shelf.release(kind, "release")),
        "control": weights_digest(shelf.release(kind, "control")),
        "b": weights_digest(shelf.release(kind, "partner")),
    }


@KINDS
def test_the_references_and_curves_agree(reports, kind):
    report = reports[kind]
    known = report.references
    assert report.utility_cost == pytest.approx(known.control - known.standalone)
    curve = {point.s: point.accuracy for point in report.scale_curve}
    other = {point.s: point.accuracy for point in report.control_scale_curve}
    assert list(curve) == list(other) == [0.0, 0.5, 1.0, 1.5]
    assert (curve[0.0], curve[1.0]) == (known.base, known.standalone)
    assert (other[0.0], other[1.0]) == (known.control_base, known.control)
    assert known.chance >= 1 / 3
    assert set(known.partners) == {"b"}
    assert [r.rows for r in known.relabelled] == [6, 20]
    if kind == "lora":  # one frozen head of descriptions, so one base
        assert known.base == known.control_base


@KINDS
def test_every_attack_is_scored_against_its_own_references(reports, kind):
    report = reports[kind]
    read = {0: report.references} | {r.rows: r for r in report.references.relabelled}
    keys = [(a.name, a.tier, a.relabel_rows) for a in report.attacks]
    assert keys == [
        *(
            (name, "T2" if rows else "T1", rows)
            for name in ("task_arithmetic", "slerp")
            for rows in (0, 6, 20)
        ),
        *(("task_arithmetic", "T3", rows) for rows in (0, 6, 20)),
    ]
    for attack in report.attacks:
        known = read[attack.relabel_rows]
        assert attack.retained == retained_skill(attack.merged, known.base, known.standalone)
        assert attack.control_retained == retained_skill(
            attack.control_merged, known.control_base, known.control
        )
        assert set(attack.partners) == {"b"}
        assert {"c[release]", "c[b]"} <= set(attack.params)
        assert {"c[control]", "c[b]"} <= set(attack.control_params)
        if not attack.admissible:
            assert attack.merged == known.base
            assert attack.retained == 0
        if not attack.control_admissible:
            assert attack.control_merged == known.control_base
            assert attack.control_retained == 0
    spent = {a.name: a.evaluations for a in report.attacks if a.tier == "T1"}
    assert all(0 < count < report.rows["evaluations"] for count in spent.values())


@KINDS
def test_the_tiers_follow_from_the_attacks(reports, kind):
    report = reports[kind]
    spreads = {t: (r.interval, r.control_interval) for t, r in report.tiers.items()}
    known = (report.attacks, report.references, report.thresholds, spreads)
    assert report.tiers == tier_results(*known)
    tried = TIERS[:3]  # T4 and T5 only when they are listed
    assert list(report.tiers) == list(tried)
    worst = [report.tiers[tier].unmergeability for tier in tried]
    assert worst == sorted(worst, reverse=True)
    for tier in tried:
        assert f"{tier} {report.tiers[tier].verdict}: " in report.verdict


@KINDS
def test_every_number_lies_in_its_interval(reports, kind):
    report = reports[kind]

    def within(value, interval):
        low, high = interval
        return low - 1e-6 <= value <= high + 1e-6

    for attack in report.attacks:
        assert within(attack.retained, attack.interval)
        assert within(attack.control_retained, attack.control_interval)
    for tier in report.tiers.values():
        assert within(tier.unmergeability, tier.interval)
        assert within(tier.control_unmergeability, tier.control_interval)
    assert within(report.utility_cost, report.utility_cost_interval)


@KINDS
def test_the_flags_follow_from_the_record(reports, kind):
    report = reports[kind]
    assert report.flags == raised(report) != []  # twenty steps and 24 rows carry no claim


@KINDS
def test_the_frontier_shows_both_sides(reports, kind):
    points = reports[kind].frontier
    assert {point.of for point in points} == {"release", "control"}
    assert {point.attack for point in points} == {"task_arithmetic"}
    for point in points:
        assert set(point.params) == {point.of, "b"}
        assert point.partners_retained >= 0


@KINDS
def test_the_record_comes_back_from_disk_as_it_was(reports, tmp_path, kind):
    reports[kind].save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == reports[kind]


def without_times(report):
    return report.model_dump(exclude={"created", "seconds"})


def test_two_runs_give_the_same_record_but_for_the_times(reports, shelf):
    assert without_times(trap2.audit(spec_of(shelf))) == without_times(reports["lora"])


def test_without_a_control_and_without_t3_the_rest_is_the_same(reports, shelf):
    settings = shelf.audit("lora", t3_attacks=[], attacks=["task_arithmetic"], relabel_rows=[])
    del settings["control"]
    heard, expected = [], []
    progress = Progress(heard.append, lambda: heard.append("tick"), heard.append, expected.append)
    report = audit(AuditSpec.model_validate(settings), progress)
    (least,) = expected
    assert 10 < least <= report.rows["evaluations"]
    whole = reports["lora"]
    assert (report.references.control, report.references.control_base) == (None, None)
    assert (report.utility_cost, report.control_scale_curve, report.frontier) == (None, [], [])
    assert report.references.standalone == whole.references.standalone
    assert report.scale_curve == whole.scale_curve
    assert list(report.tiers) == ["T1"]
    assert report.tiers["T1"].control_unmergeability is None
    assert report.tiers["T1"].control_interval is report.utility_cost_interval is None
    (attack,) = report.attacks
    same = next(a for a in whole.attacks if a.name == attack.name and a.tier == "T1")
    assert (attack.params, attack.merged) == (same.params, same.merged)
    assert (attack.control_params, attack.control_merged, attack.control_retained) == (None,) * 3
    assert attack.control_interval is None
    assert attack.interval == same.interval
    assert "control" not in report.digests
    assert heard.count("tick") == report.rows["evaluations"]
    assert heard[0] == "reading releases and rows"
    assert "task_arithmetic on the release, one coefficient" in heard


def test_what_cannot_be_done_is_refused_before_anything_is_loaded(shelf, monkeypatch):
    def never(*args):
        raise AssertionError("an arena was made")

    monkeypatch.setattr(Arena, "__init__", never)
    with pytest.raises(UserError, match="no attack is called 'tise'; did you mean 'ties'"):
        audit(spec_of(shelf, attacks=["tise"]))


def test_too_few_labelled_rows_are_refused_before_any_evaluation(shelf):
    ticks = []
    progress = Progress(lambda text: None, lambda: ticks.append(1))
    with pytest.raises(UserError, match="with 25 rows needs as many validation rows, there are 24"):
        audit(spec_of(shelf, relabel_rows=[25]), progress)
    assert ticks == []


def test_a_scale_that_is_no_number_is_refused(shelf):
    settings = {**shelf.audit("lora"), "scales": [0.0, float("nan")]}
    with pytest.raises(ValidationError, match="finite number"):
        AuditSpec.model_validate(settings)


def test_an_audit_names_each_task_once(shelf):
    settings = shelf.audit("lora")
    settings["partners"] *= 2
    with pytest.raises(ValidationError, match="task names must differ, got a, b, b; rename one"):
        AuditSpec.model_validate(settings)
