import subprocess
import sys

import pytest
from samples import HOSTILE, build_report

from trap2.reporting import text
from trap2.reporting.words import NONE
from trap2.schema import Flag


def test_numbers_are_the_records():
    report = build_report()
    shown = text.render(report)
    refs = report.references
    for value in (refs.chance, refs.base, refs.standalone, refs.control):
        assert f"{100 * value:.1f}%" in shown
    for tier, result in report.tiers.items():
        row = next(line for line in shown.splitlines() if line.startswith(f"{tier} "))
        assert f"{100 * result.unmergeability:.1f}%" in row
        assert f"{100 * result.control_unmergeability:.1f}%" in row
        assert result.verdict in row
        assert result.worst_attack in row
    assert "Utility cost: 0.6 points" in shown
    for rows in report.references.relabelled:
        assert f"re-labelled, {rows.rows} rows" in shown


def test_verdict_comes_first_and_limits_last():
    report = build_report()
    shown = text.render(report, width=400)
    assert shown.startswith(f"Verdict: {report.verdict}")
    assert shown.rstrip().endswith(report.limits[-1])
    assert "one seed (7)" in shown


@pytest.mark.parametrize("width", [60, 100, 140])
def test_flags_follow_the_verdict_and_fit(width):
    flags = [
        Flag(code="T003", title="there is no control", detail="nothing says that it works"),
        Flag(code="T013", title=HOSTILE, detail=HOSTILE),
    ]
    report = build_report().model_copy(update={"flags": flags})
    shown = text.render(report, width)
    lines = shown.splitlines()
    assert max(map(len, lines)) <= width
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    row = next(line for line in lines if line.startswith("T003"))
    assert "there is no control" in text.render(report, 200)
    assert row.split()[0] == "T003"
    heads = ["Verdict:", "Reasons to doubt this audit", "T003", "T013", "docs/flags.md", "Audited:"]
    places = [shown.index(head) for head in heads]
    assert places == sorted(places)
    assert "Reasons to doubt" not in text.render(build_report())


@pytest.mark.parametrize("width", [60, 80, 100, 140])
@pytest.mark.parametrize("name", ["trec6-protected", HOSTILE])
def test_no_line_is_wider_than_asked(width, name):
    shown = text.render(build_report(name=name), width)
    assert max(map(len, shown.splitlines())) <= width


def test_columns_are_aligned():
    lines = text.render(build_report()).splitlines()
    top = next(i for i, line in enumerate(lines) if line.startswith("outputs"))
    ends = {len(line) for line in lines[top : top + 5]}
    assert len(ends) == 1


def test_control_characters_do_not_reach_the_terminal():
    shown = text.render(build_report(name=HOSTILE))
    assert "\x1b" not in shown
    assert "\r" not in shown
    assert "\u202e" not in shown
    assert "A" * 101 not in shown.replace("\n", "")
    assert "holds against T1" in " ".join(shown.split())  # the sentence outlives the name


def test_without_a_control_nothing_is_invented():
    shown = text.render(build_report(control=False))
    assert f"Utility cost: {NONE}" in shown
    assert "(3.3%)" not in shown
    row = next(line for line in shown.splitlines() if line.startswith("as they are"))
    assert row.split()[-2] == NONE


def test_tiers_left_out_are_named():
    report = build_report()
    tiers = {"T1": report.tiers["T1"]}
    shown = text.render(report.model_copy(update={"tiers": tiers}), width=400)
    assert "Tiers not tested here: T2, T3, T4, T5." in shown


def test_text_needs_neither_matplotlib_nor_jinja_nor_torch():
    code = (
        "import sys, trap2.reporting.text; "
        "assert not {'matplotlib', 'jinja2', 'torch'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
