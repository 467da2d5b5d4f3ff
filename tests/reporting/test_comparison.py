from samples import HOSTILE, build_report, with_intervals

from trap2.reporting import html, text
from trap2.reporting.comparison import leaderboard
from trap2.reporting.words import NONE
from trap2.schema import Flag


def named(name, unmergeability=0.588, **update):
    report = build_report()
    tiers = report.tiers | {
        "T3": report.tiers["T3"].model_copy(update={"unmergeability": unmergeability})
    }
    release = report.release.model_copy(update={"name": name})
    return report.model_copy(update={"release": release, "tiers": tiers, **update})


def board(*reports):
    return leaderboard([(f"{n}/report.json", report) for n, report in enumerate(reports)])


def test_rows_hold_the_records_numbers():
    flag = Flag(code="T003", title="x", detail="y")
    table = board(named("a", flags=[flag]), with_intervals(named("b")))
    rows = {row[0]: dict(zip(table.headers, row, strict=True)) for row in table.rows}
    assert rows["a"] == {
        "release": "a",
        "task": "trec6",
        "setting": "1",
        "seed": "7",
        "alone": "95.0%",
        "utility cost": "0.6 points",
        "T1": "100.0% [3.3%]",
        "T2": "94.2% [3.1%]",
        "T3": "58.8% [2.0%]",
        "verdict": "holds, holds, leaks",
        "flags": "T003",
        "report": "0/report.json",
    }
    assert rows["b"]["T3"] == "58.8% (53.8 to 63.8) [2.0%]"
    assert rows["b"]["utility cost"] == "0.6 points (-1.4 to 2.6)"
    assert rows["b"]["flags"] == NONE


def test_the_most_unmergeable_comes_first_and_then_the_cheapest():
    table = board(
        named("leaky", 0.2),
        named("dear", 0.9, utility_cost=0.05),
        named("cheap", 0.9, utility_cost=0.01),
        named("untested", tiers={}),
    )
    assert [row[0] for row in table.rows] == ["cheap", "dear", "leaky", "untested"]
    assert table.rows[-1][6:10] == (NONE, NONE, NONE, NONE)


def test_audits_of_another_kind_are_another_setting():
    plain = named("plain")
    others = [
        named("base", digests={"base": "sha256:other"}),
        named("attacker", settings={"grid": [0.5]}),
        named("rows", rows={"validation": 300, "test": 100}),
        named("partners", release=plain.release.model_copy(update={"partners": ["sst2"]})),
    ]
    same = named("same", seed=3, rows=plain.rows | {"evaluations": 12})
    table = board(plain, *others, same)
    assert [row[2] for row in table.rows] == ["1", "1", "2", "3", "4", "5"]
    assert {row[0] for row in table.rows[:2]} == {"plain", "same"}


def test_hostile_names_stay_words_on_page_and_in_the_terminal():
    report = build_report(name=HOSTILE)
    reports = [(HOSTILE, report), ("b", report)]
    page, shown = html.render_comparison(reports), text.aligned(leaderboard(reports), 120)
    assert page.count("<script") == 1
    for whole in (page, shown):
        assert "\u202e" not in whole
        assert "\x1b" not in whole
        assert "A" * 101 not in whole
    assert max(map(len, shown.splitlines())) <= 120
    assert report.release.name[:20] not in page  # only escaped
