"""Several seeds as one record: numbers by hand, and what cannot be averaged is refused."""

import json

import pytest
from scipy import stats

from reporting.samples import build_report
from trap2.auditing.combine import CODE, TITLE, combine
from trap2.cli import main
from trap2.errors import UserError
from trap2.reporting.combined import render
from trap2.schema import Combined, Flag, Report

RECIPE = {"seed": "0", "training.steps": "600", "trap2.strength": "0.3", "base": '"/a"'}


def audit(seed: int, u: float, control: float | None = 0.1, **parts) -> Report:
    """An audit whose T1 has unmergeability u, and no other tier."""
    report = build_report(control is not None)
    recipe = {**RECIPE, "seed": str(seed), "base": f'"/home/{seed}"'}
    tier = report.tiers["T1"].model_copy(
        update={"unmergeability": u, "control_unmergeability": control}
    )
    update = {
        "release": report.release.model_copy(update={"recipe": recipe, "name": f"seed-{seed}"}),
        "tiers": {"T1": tier},
        "digests": {**report.digests, "release": f"sha256:{seed}"},
        "seed": seed,
    }
    return report.model_copy(update={**update, **parts})


def named(*reports: Report) -> list[tuple[str, Report]]:
    return [(f"{place}/report.json", report) for place, report in enumerate(reports)]


def test_mean_deviation_and_interval_are_those_of_the_textbook():
    values = [0.9, 0.8, 0.85]
    combined = combine(named(*(audit(seed, u) for seed, u in enumerate(values))))
    over = combined.tiers["T1"].unmergeability
    assert over.values == values
    assert over.mean == pytest.approx(0.85)
    assert over.deviation == pytest.approx(0.05)
    known = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert over.interval == pytest.approx((known.low, known.high))
    assert over.interval == pytest.approx((0.85 - 4.302653 * 0.05 / 3**0.5, 0.9742), abs=1e-4)
    assert combined.tiers["T1"].verdict == "inconclusive"
    assert combined.tiers["T1"].verdicts == ["holds"] * 3
    assert combined.utility_cost.mean == pytest.approx(0.006)
    assert (combined.utility_cost.deviation, combined.seeds) == (0, ["0", "1", "2"])
    assert combined.standalone.mean == pytest.approx(0.95)
    assert [digests["release"] for digests in combined.digests] == [f"sha256:{s}" for s in range(3)]
    assert combined.release.recipe == {
        "training.steps": "600",
        "trap2.strength": "0.3",
        "base": '"/home/0"',
    }


def test_equal_seeds_leave_what_the_rows_leave_open():
    def certain(seed, low):
        report = audit(seed, 1.0)
        tier = report.tiers["T1"].model_copy(update={"interval": (low, 1.0)})
        return report.model_copy(
            update={"tiers": {"T1": tier}, "utility_cost_interval": (-0.01, 0.03)}
        )

    combined = combine(named(certain(0, 0.9), certain(1, 0.8)))
    assert combined.tiers["T1"].unmergeability.interval == pytest.approx((0.85, 1.0))
    assert combined.tiers["T1"].verdict == "holds"
    assert combined.utility_cost.interval == pytest.approx((-0.01, 0.03))


def test_an_interval_stays_among_the_shares():
    combined = combine(named(audit(0, 0.0, 0.0), audit(1, 1.0, 0.0)))
    assert combined.tiers["T1"].unmergeability.interval == (0.0, 1.0)


def test_without_a_control_nothing_is_said_of_one():
    combined = combine(named(audit(0, 0.9, None), audit(1, 0.9, None)))
    assert combined.control is combined.utility_cost is None
    assert combined.tiers["T1"].control_unmergeability is None
    assert "control" in render(combined)  # the column is there, with a dash
    assert combined.flags == []


def test_no_skill_on_average_leaves_nothing_to_protect():
    report = audit(0, 1.0)
    useless = report.references.model_copy(update={"standalone": 0.5})
    reports = [audit(seed, 1.0, references=useless) for seed in (0, 1)]
    assert combine(named(*reports)).tiers["T1"].verdict == "nothing to protect"


def with_recipe(report: Report, **changes: str) -> Report:
    recipe = {**report.release.recipe, **{k.replace("__", "."): v for k, v in changes.items()}}
    return report.model_copy(
        update={"release": report.release.model_copy(update={"recipe": recipe})}
    )


def in_release(report: Report, **changes) -> Report:
    return report.model_copy(update={"release": report.release.model_copy(update=changes)})


OTHER, FEW = audit(1, 0.9), {"validation": 9, "test": 8}
REFUSED = [
    ([audit(0, 0.9)], "1 report cannot be combined; give one for each seed"),
    (
        [audit(0, 0.9), in_release(OTHER, recipe={})],
        "1/report.json does not say by which recipe and seed its release was trained; audit a "
        "release with its trap2.json again",
    ),
    (
        [audit(0, 0.9), OTHER, audit(0, 0.8)],
        "2/report.json is of seed 0, as 0/report.json is; give one for each seed",
    ),
    (
        [audit(0, 0.9), with_recipe(OTHER, training__steps="700")],
        "1/report.json and 0/report.json differ in recipe.training.steps; combine audits of one "
        "recipe that differ in the training seed alone",
    ),
    ([audit(0, 0.9), with_recipe(OTHER, more="1")], "differ in recipe.more; "),
    ([audit(0, 0.9), with_recipe(OTHER, **{"a\nb": "1"})], "differ in recipe.a b; "),
    ([audit(0, 0.9), in_release(OTHER, task="other")], "differ in task; "),
    ([audit(0, 0.9), in_release(OTHER, partners=["x"])], "differ in partners; "),
    ([audit(0, 0.9), audit(1, 0.9, None)], "differ in has_control; "),
    (
        [audit(0, 0.9), audit(1, 0.9, digests={**OTHER.digests, "base": "sha256:x"})],
        "differ in base; ",
    ),
    (
        [audit(0, 0.9), audit(1, 0.9, settings={**OTHER.settings, "grid": [0.1]})],
        "differ in attacker.grid; ",
    ),
    ([audit(0, 0.9), audit(1, 0.9, partners_keep=0.9)], "differ in partners_keep; "),
    (
        [
            audit(0, 0.9),
            audit(1, 0.9, tiers=build_report().tiers, rows={"validation": 9, "test": 8}),
        ],
        "differ in validation rows, test rows, tiers; ",
    ),
    (
        [
            audit(0, 0.9),
            audit(1, 0.9, settings={}, rows=FEW, partners_keep=0.5),
        ],
        "differ in attacker.grid, attacker.share, attacker.path and 3 more; ",
    ),
]


@pytest.mark.parametrize(("reports", "message"), REFUSED)
def test_what_differs_in_more_than_the_seed_is_refused(reports, message):
    with pytest.raises(UserError) as caught:
        combine(named(*reports))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_scale_seed_and_the_place_of_the_base_may_differ():
    reports = [with_recipe(audit(seed, 0.9), trap2__scale_seed=str(seed)) for seed in (0, 1)]
    assert combine(named(*reports)).seeds == ["0", "1"]


def test_seeds_that_differ_more_than_the_trap_does_are_flagged():
    (flag,) = combine(named(audit(0, 0.9, 0.5), audit(1, 0.4, 0.5))).flags
    assert flag == Flag(
        code=CODE,
        title=TITLE,
        detail="in T1 unmergeability spreads over 50.0 points from seed to seed, and is 15.0 "
        "points above the control's",
    )
    assert combine(named(audit(0, 0.9, 0.1), audit(1, 0.4, 0.1))).flags == []
    assert combine(named(audit(0, 0.9, 0.9), audit(1, 0.9, 0.9))).flags == []


def test_the_doubts_of_the_single_audits_are_kept():
    def doubtful(seed, *codes):
        flags = [Flag(code=code, title=f"of {code}", detail=f"{seed}") for code in codes]
        return audit(seed, 0.9, flags=flags)

    combined = combine(named(doubtful(0, "T009"), doubtful(1, "T003", "T009"), doubtful(2)))
    assert [(f.code, f.title, f.detail) for f in combined.flags] == [
        ("T003", "of T003", "in 1 of 3 audits, first: 1"),
        ("T009", "of T009", "in 2 of 3 audits, first: 0"),
    ]
    assert "T009" in render(combined)


def test_the_command_writes_the_record_and_prints_it(tmp_path, capsys):
    paths = []
    for seed, u in enumerate((0.9, 0.8)):
        paths.append(str(tmp_path / f"{seed}.json"))
        audit(seed, u).save(tmp_path / f"{seed}.json")
    out = tmp_path / "all"
    assert main(["combine", *paths, "--out", str(out)]) == 0
    assert [p.name for p in out.iterdir()] == ["combined.json"]
    combined = Combined.model_validate(json.loads((out / "combined.json").read_text()))
    assert combined == combine([(p, Report.load(tmp_path / p)) for p in paths])
    shown = capsys.readouterr().out
    assert "85.0% [" in shown
    assert "90.0%, 80.0%" in shown
    assert shown.endswith(f"record: {out / 'combined.json'}\n")
    assert main(["combine", *paths, "--out", str(out)]) == 2
    assert "exists already; pass --overwrite" in capsys.readouterr().err
    assert main(["combine", paths[0], paths[0], "--out", str(out), "--overwrite"]) == 2
    assert "is of seed 0, as" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["combined.json"]
