import subprocess
import sys

import pytest
from samples import build_report

from trap2.reporting import text
from trap2.schema import Flag, PartnerScore

HOSTILE = "<script>alert(1)</script>\"'$x_1$ `a`|*b* \x1b[31m\r\n\u202eevil " + "A" * 10_000


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


def test_differences_keep_their_sign_and_zero_has_none():
    assert text.points(-0.012) == "-1.2 points"
    assert text.points(-0.0001) == "0.0 points"


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
    assert f"Utility cost: {text.NONE}" in shown
    assert "(3.3%)" not in shown
    row = next(line for line in shown.splitlines() if line.startswith("as they are"))
    assert row.split()[-2] == text.NONE


def test_inadmissible_merges_are_starred_and_explained():
    report = build_report()
    starred = [row for row in text.attack_table(report).rows if row[3].startswith("*")]
    assert [row[3] for row in starred] == ["*99.1%"]
    assert "* the partners lose too much" in text.render(report)
    fair = report.model_copy(update={"attacks": report.attacks[:-1]})
    assert "* the partners" not in text.render(fair)


def test_partners_kept_is_the_mean_of_shares():
    scores = {
        "a": PartnerScore(merged=0.4, without_release=0.8),
        "b": PartnerScore(merged=0.9, without_release=0.9),
        "hopeless": PartnerScore(merged=0.0, without_release=0.0),
    }
    assert text.partners_kept(scores) == pytest.approx(0.75)
    assert text.partners_kept({}) is None


def test_relabelling_table_puts_readings_side_by_side():
    table = text.relabelling_table(build_report())
    assert table.headers == ("what is read", "raw", "30 rows", "300 rows")
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["base model"] == ("51.0%", "55.3%", "61.4%")
    assert rows["release merged by task_arithmetic"] == ("2.0%", "24.1%", "61.4%")
    bare = text.relabelling_table(build_report(control=False))
    assert not [row for row in bare.rows if "control" in row[0]]


def test_recovery_table_says_what_the_release_adds_to_a_budget():
    report = build_report()
    table = text.recovery_table(report)
    assert table.rows == (
        ("probe", "100", text.NONE, "*72.0%", "70.0%", "91.0%", "70.0%", "8.0% (84.0%)"),
        ("finetune_after", "100", "60", "72.0%", "70.0%", "91.0%", "70.0%", "8.0% (84.0%)"),
        ("distil (reference)", "100", "60", "72.0%", "70.0%", "91.0%", "70.0%", "8.0% (84.0%)"),
    )
    assert "Attackers who train" in text.render(report)
    bare = report.model_copy(update={"recovery": []})
    assert "Attackers who train" not in text.render(bare)
    assert text.recovery_table(build_report(control=False)).rows[0][5:] == (
        text.NONE,
        text.NONE,
        f"8.0% ({text.NONE})",
    )


def test_tiers_left_out_are_named():
    report = build_report()
    tiers = {"T1": report.tiers["T1"]}
    shown = text.render(report.model_copy(update={"tiers": tiers}), width=400)
    assert "Tiers not tested here: T2, T3, T4, T5." in shown


def test_long_lists_of_coefficients_are_cut():
    assert text.coefficients({"c": [0.1] * 40, "drop": 0.25, "on": True}) == (
        "c=[0.1 0.1 0.1 0.1 0.1 0.1 … 40], drop=0.25, on=True"
    )


def test_markdown_tables_keep_their_shape():
    for name in ("trec6-protected", HOSTILE):
        report = build_report(name=name)
        tiers = {"T1": report.tiers["T1"].model_copy(update={"worst_attack": name})}
        shown = text.to_markdown(report.model_copy(update={"tiers": tiers}))
        assert "<script" not in shown
        for table in shown.split("\n\n")[:2]:
            bars = {line.replace("\\|", "").count("|") for line in table.splitlines()}
            assert len(bars) == 1
    assert r"\`a\`" in text.to_markdown(report.model_copy(update={"tiers": tiers}))


def test_text_needs_neither_matplotlib_nor_jinja_nor_torch():
    code = (
        "import sys, trap2.reporting.text; "
        "assert not {'matplotlib', 'jinja2', 'torch'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
