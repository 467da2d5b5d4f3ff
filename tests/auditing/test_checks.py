"""Every check raised and not raised, in its own words, and its entry in the docs."""

import re
from pathlib import Path

import pytest

from reporting.samples import build_report
from trap2.auditing.checks import CHECKS, raised
from trap2.auditing.combine import CODE, TITLE
from trap2.schema import Evidence, Flag, Report, ScalePoint, Thresholds

DOCS = Path(__file__).parents[2] / "docs" / "flags.md"


def changed(report: Report, **parts) -> Report:
    """A copy in which parts are replaced; of a record, a dict replaces the named fields alone."""
    whole = {
        name: getattr(report, name).model_copy(update=part)
        if isinstance(part, dict) and name not in ("rows", "tiers")
        else part
        for name, part in parts.items()
    }
    return report.model_copy(update=whole)


def attacks(report: Report, **fields) -> Report:
    return changed(report, attacks=[a.model_copy(update=fields) for a in report.attacks])


def tiers(report: Report, **fields) -> Report:
    """The tiers with a field replaced, e.g. T1={...}."""
    copies = {t: r.model_copy(update=fields.get(t, {})) for t, r in report.tiers.items()}
    return changed(report, tiers=copies)


def sound() -> Report:
    """A record without a reason for doubt."""
    report = attacks(build_report(), merged=0.5)
    return changed(
        report,
        scale_curve=scales({0.0: 0.51, 0.5: 0.5, 0.9: 0.9, 1.0: 0.95, 1.5: 0.4}),
        references={"partners_base": {"subj": 0.5}, "partners_chance": {"subj": 0.5}},
        evidence=Evidence(control_differs=[], reload_gap={"release": 2e-7, "control": 3e-7}),
    )


GRIDS = {
    "ties": {"coefficient": [0.0, 0.5, 1.0, 2.0], "density": [0.1, 0.2, 1.0]},
    "slerp": {"place": [0.0, 0.25, 0.75, 1.0]},
    "dare_ties": {"seed": [0.0, 1.0, 2.0], "drop": [0.5]},
}


def chosen(release: dict, control: dict, name: str, **fields) -> Report:
    """A record whose attack chose so, with `GRIDS` tried."""
    report = attacks(sound(), name=name, params=release, control_params=control, **fields)
    return changed(report, evidence={"grids": GRIDS})


def scales(accuracies: dict[float, float]) -> list[ScalePoint]:
    return [ScalePoint(s=s, accuracy=a, loss=1.0) for s, a in accuracies.items()]


def curve(*accuracies: float) -> list[ScalePoint]:
    return scales({s / 2: a for s, a in enumerate(accuracies)})


def by_tier(*found: dict) -> Report:
    """A record of one attack: what it found in T1, T2 and T3."""
    same = {"name": "ties", "merged": 0.5, "admissible": True, "control_admissible": True}
    report = attacks(sound(), control_merged=0.8, **same)
    rows = [
        report.attacks[0].model_copy(update={"relabel_rows": 30, "tier": f"T{k + 1}", **row})
        for k, row in enumerate(found)
    ]
    return changed(report, attacks=rows)


RAISED = [
    (
        "T001",
        changed(sound(), references={"standalone": 0.51}),
        "as released it reaches 51.0 %, its base 51.0 %: there is no skill that a merge could "
        "keep or lose",
    ),
    (
        "T002",
        changed(sound(), references={"partners_base": {"sst2": 0.828, "subj": 0.1}}),
        "no skill on its own task: 'sst2' 82.8 % (base or chance 82.8 %)",
    ),
    (
        "T002",
        changed(sound(), references={"partners_chance": {"subj": 0.94, "agnews": 0.9}}),
        "no skill on its own task: 'agnews' 89.2 % (base or chance 90.0 %), "
        "'subj' 93.0 % (base or chance 94.0 %)",
    ),
    (
        "T003",
        changed(sound(), release={"has_control": False}, evidence={"control_differs": None}),
        "without the same recipe at strength 0, nothing says that a merge would have worked",
    ),
    (
        "T004",
        tiers(sound(), T1={"control_unmergeability": 0.71}, T3={"control_unmergeability": 0.7}),
        "the most that a merge keeps of the control's skill is 29.0 % in T1",
    ),
    (
        "T005",
        changed(sound(), evidence={"control_differs": ["seed", "training.steps"]}),
        "their recipes differ in seed, training.steps",
    ),
    (
        "T005",
        changed(sound(), evidence={"control_differs": list("abcdefgh")}),
        "their recipes differ in a, b, c, d, e, f and 2 more",
    ),
    (
        "T005",
        changed(sound(), evidence={"control_differs": None}),
        "one of the two has no recipe in its trap2.json, so they cannot be compared",
    ),
    (
        "T006",
        attacks(sound(), control_admissible=False),
        "no attack found a mixture with some of the control's skill in which the partners keep "
        "95.0 %",
    ),
    (
        "T007",
        changed(sound(), scale_curve=curve(0.5, 0.08, 0.9)),
        "alone at scale 0.5 it is right in 8.0 % of the rows, guessing in 16.7 %: the skill may "
        "only be turned round, so judge by T2 and T3",
    ),
    (
        "T007",
        attacks(sound(), name="ties", merged=0.02),
        "merged by ties (T1) it is right in 2.0 % of the rows, guessing in 16.7 %: the skill may "
        "only be turned round, so judge by T2 and T3",
    ),
    (
        "T008",
        tiers(sound(), T1={"unmergeability": 0.98}, T2={"unmergeability": 0.4}),
        "a merge keeps 2.0 % of the skill as it is (T1) and 60.0 % once its outputs are "
        "re-labelled (T2): T1 says nothing here",
    ),
    (
        "T009",
        changed(sound(), rows={"validation": 500, "test": 120}),
        "on 120 rows the 95 % interval of an accuracy is 17.6 points wide, and the whole skill "
        "measures 44.0 points",
    ),
    (
        "T009",
        tiers(sound(), T2={"interval": (0.5, 0.95)}, T3={"interval": (0.5, 0.9)}),
        "the 95 % interval of unmergeability reaches from 50.0 % to 95.0 % in T2",
    ),
    (
        "T010",
        chosen({"c[release]": 2.0, "density": 0.2}, {"c[control]": 0.5, "density": 0.1}, "ties"),
        "the attacker chose the largest or the smallest it tried: ties coefficient=2 (release), "
        "ties density=0.1 (control)",
    ),
    (
        "T011",
        changed(sound(), evidence={"batch_norm_layers": 53}),
        "running statistics of 53 layers are not recomputed after a merge, as an attacker with "
        "unlabelled rows would do; set attacker.recompute_statistics",
    ),
    (
        "T012",
        changed(sound(), evidence={"reload_gap": {"release": 0.12, "control": None}}),
        "the release at s = 1 is off by 12 % of its largest logit, the control cannot be loaded "
        "by transformers",
    ),
    (
        "T013",
        changed(sound(), evidence={"surrogates": ["mpqa", "sst2"]}),
        "the release was trained against 'sst2'",
    ),
    (
        "T015",
        by_tier({"merged": 0.6}, {"merged": 0.5}),
        "right answers of the best merge: ties (release) 60.0 % in T1 and 50.0 % in T2",
    ),
    (
        "T015",
        by_tier({}, {"merged": 0.6, "control_merged": 0.8}, {"control_merged": 0.7}),
        "right answers of the best merge: ties (release) 60.0 % in T2 and 50.0 % in T3, "
        "ties (control) 80.0 % in T1 and 70.0 % in T3, ties (control) 80.0 % in T2 and 70.0 % in "
        "T3",
    ),
    (
        "T016",
        changed(sound(), scale_curve=scales({0.0: 0.95, 0.7: 0.74, 0.75: 0.95, 1.5: 0.7})),
        "alone at scale 0.7 it keeps 52.3 % of its skill: merges that fail here do so for the "
        "partners' sake or by chance, and others will not",
    ),
    (
        "T016",
        changed(sound(), scale_curve=scales({1.3: 0.95})),
        "alone at scale 1.3 it keeps 100.0 % of its skill: merges that fail here do so for the "
        "partners' sake or by chance, and others will not",
    ),
]

NOT_RAISED = [
    ("T001", changed(sound(), references={"standalone": 0.52})),
    ("T002", changed(sound(), references={"partners_base": {}, "partners_chance": {}})),
    ("T002", changed(sound(), references={"partners_base": {"sst2": 0.82}})),
    ("T003", sound()),
    ("T004", tiers(sound(), T1={"control_unmergeability": 0.7})),
    ("T004", tiers(sound(), T1={"control_unmergeability": None})),
    (
        "T004",
        changed(
            tiers(sound(), T1={"control_unmergeability": 0.8}),
            thresholds=Thresholds(mergeable=0.2),
        ),
    ),
    ("T005", changed(sound(), release={"has_control": False})),
    (
        "T006",
        changed(
            sound(),
            attacks=[*attacks(sound(), control_admissible=False).attacks[1:], sound().attacks[0]],
        ),
    ),
    ("T006", changed(attacks(sound(), control_admissible=None), release={"has_control": False})),
    ("T007", changed(sound(), scale_curve=curve(0.01, 0.09, 0.9))),
    ("T007", attacks(sound(), merged=0.02, relabel_rows=30)),
    ("T007", attacks(sound(), merged=0.02, admissible=False)),
    ("T007", changed(sound(), scale_curve=[], attacks=[])),
    ("T008", tiers(sound(), T1={"unmergeability": 0.98}, T2={"unmergeability": 0.8})),
    ("T008", changed(sound(), tiers={"T2": sound().tiers["T2"]})),
    ("T009", changed(sound(), rows={"validation": 121, "test": 500})),
    ("T009", tiers(sound(), T1={"interval": (0.6, 1.0)})),
    ("T009", changed(tiers(sound(), T1={"interval": (0.0, 1.0)}), references={"base": 0.95})),
    ("T010", chosen({"c[release]": 0.0, "density": 1.0}, {"c[control]": 1.0}, "ties")),
    ("T010", chosen({"c[release]": 2.0}, {"c[control]": 2.0}, "ties", tier="T3")),
    ("T010", chosen({"c[release]": 2.0}, {}, "ties", admissible=False)),
    ("T010", chosen({}, {"c[control]": 2.0}, "ties", control_admissible=False)),
    ("T010", chosen({"c[release]": 0.0}, {"c[control]": 1.0}, "slerp")),
    ("T010", chosen({"seed": 2}, {"drop": 0.5}, "dare_ties")),
    ("T011", sound()),
    ("T012", changed(sound(), evidence={"reload_gap": {"release": 1e-3}})),
    ("T013", changed(sound(), evidence={"surrogates": ["mpqa"]})),
    ("T015", by_tier({"merged": 0.6}, {"merged": 0.562})),
    ("T015", by_tier({"merged": 0.5}, {"merged": 0.9}, {"merged": 0.95})),
    ("T015", by_tier({"merged": 0.6, "admissible": False}, {"merged": 0.5})),
    ("T015", by_tier({"merged": 0.6}, {"merged": 0.5, "admissible": False})),
    ("T015", by_tier({"merged": 0.6}, {"name": "slerp", "merged": 0.5})),
    ("T015", by_tier({}, {"control_merged": None, "merged": 0.5})),
    ("T016", changed(sound(), scale_curve=scales({0.0: 0.95, 0.5: 0.73, 0.75: 0.95}))),
    ("T016", changed(sound(), scale_curve=[])),
    ("T016", changed(sound(), scale_curve=scales({0.5: 0.9}), references={"standalone": 0.51})),
]


def test_a_sound_record_has_no_flags():
    assert raised(sound()) == []


@pytest.mark.parametrize(("code", "report", "detail"), RAISED)
def test_what_is_doubtful_is_said_and_nothing_else(code, report, detail):
    assert raised(report) == [Flag(code=code, title=CHECKS.get(code).title, detail=detail)]


@pytest.mark.parametrize(("code", "report"), NOT_RAISED)
def test_what_is_only_near_is_not_raised(code, report):
    assert CHECKS.get(code).reason(report) == ""


def test_every_check_is_tested_both_ways():
    assert {code for code, *_ in RAISED} == {code for code, *_ in NOT_RAISED} == {*CHECKS}


def test_every_flag_has_its_entry_in_the_docs_and_every_entry_its_flag():
    entries = re.split(r"^## ", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    told = dict(entry.split("\n", 1) for entry in entries)
    titles = {code: CHECKS.get(code).title for code in CHECKS} | {CODE: TITLE}
    assert list(told) == [f"{code}: {title}" for code, title in sorted(titles.items())]
    for entry in told.values():
        parts = re.findall(r"^\*(Raised if|Means|Do)\* \S", entry, flags=re.MULTILINE)
        assert parts == ["Raised if", "Means", "Do"]


def test_several_reasons_come_in_the_order_of_their_codes():
    report = changed(sound(), evidence={"surrogates": ["subj"], "batch_norm_layers": 1})
    assert [flag.code for flag in raised(report)] == ["T011", "T013"]
