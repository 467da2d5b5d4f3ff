import pytest
from samples import build_report, with_intervals

from trap2.reporting import html, markdown, tables, text
from trap2.reporting.words import NONE
from trap2.schema import PartnerScore


def test_inadmissible_merges_are_starred_and_explained():
    report = build_report()
    starred = [row for row in tables.attack_table(report).rows if row[3].startswith("*")]
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
    assert tables.partners_kept(scores) == pytest.approx(0.75)
    assert tables.partners_kept({}) is None


def test_relabelling_table_puts_readings_side_by_side():
    table = tables.relabelling_table(build_report())
    assert table.headers == ("what is read", "raw", "30 rows", "300 rows")
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["base model"] == ("51.0%", "55.3%", "61.4%")
    assert rows["release merged by task_arithmetic"] == ("2.0%", "24.1%", "61.4%")
    bare = tables.relabelling_table(build_report(control=False))
    assert not [row for row in bare.rows if "control" in row[0]]


def test_recovery_table_says_what_the_release_adds_to_a_budget():
    report = build_report()
    table = tables.recovery_table(report)
    assert table.rows == (
        ("probe", "100", NONE, "*72.0%", "70.0%", "91.0%", "70.0%", "8.0%", "84.0%"),
        ("finetune_after", "100", "60", "72.0%", "70.0%", "91.0%", "70.0%", "8.0%", "84.0%"),
        ("distil (reference)", "100", "60", "72.0%", "70.0%", "91.0%", "70.0%", "8.0%", "84.0%"),
    )
    bare = report.model_copy(update={"recovery": []})
    for render in (text.render, markdown.render, html.render):
        assert "Attackers who train" in render(report)
        assert "Attackers who train" not in render(bare)
    assert tables.recovery_table(build_report(control=False)).rows[0][5:] == (
        NONE,
        NONE,
        "8.0%",
        NONE,
    )


def test_routing_stands_in_a_table_of_its_own():
    report = build_report()
    kept = "sst2 82.8%, agnews 89.2%, subj 93.0%"
    assert tables.routing_table(report).rows == (
        ("emr", NONE, "90.0%", "88.6%", "93.0%", "94.2%", kept),
    )
    assert tables.routing_table(build_report(control=False)).rows[0][4:6] == (NONE, NONE)
    bare = report.model_copy(update={"routing": []})
    for render in (text.render, markdown.render, html.render):
        assert "no tier" in render(report)
        assert "emr" in render(report)
        assert "emr" not in render(bare)


def test_long_lists_of_coefficients_are_cut():
    assert tables.coefficients({"c": [0.1] * 40, "drop": 0.25, "on": True}) == (
        "c=[0.1 0.1 0.1 0.1 0.1 0.1 … 40], drop=0.25, on=True"
    )


def test_one_coefficient_for_all_models_is_said_once():
    shared = {"c[release]": 0.5, "c[a]": 0.5, "density": 0.2}
    assert tables.coefficients(shared) == "c=0.5, density=0.2"
    assert tables.coefficients({**shared, "c[a]": 0.4}) == "c[release]=0.5, c[a]=0.4, density=0.2"
    assert tables.coefficients({"c[release]": 0.5}) == "c[release]=0.5"


def test_chosen_coefficients_stand_model_by_model():
    report = build_report()
    chosen = report.attacks[-1].model_copy(
        update={
            "params": {"c[release]": 1.0, "c[sst2]": 0.25, "drop": 0.5},
            "control_params": {"c[control]": 0.5, "c[sst2]": 0.75},
        }
    )
    table = tables.chosen_coefficients(report.model_copy(update={"attacks": [chosen]}))
    assert table.headers == ("attack", "labelled rows", "merged", "its own", "sst2")
    assert table.rows == (
        ("shrunk partners", "300", "release", "1", "0.25"),
        ("shrunk partners", "300", "control", "0.5", "0.75"),
    )
    one_tier = report.model_copy(update={"attacks": report.attacks[:3]})
    assert tables.chosen_coefficients(one_tier).rows == ()


def test_the_verdict_is_split_into_its_sentences():
    said = "It reaches 95.2 %. T1 holds: 0 %. T2 leaks: 30 %."
    report = build_report().model_copy(update={"verdict": said})
    assert tables.verdict(report) == ["It reaches 95.2 %.", "T1 holds: 0 %.", "T2 leaks: 30 %."]
    assert tables.verdict(report.model_copy(update={"verdict": "holds"})) == ["holds"]


def test_intervals_stand_beside_what_they_are_of():
    report = with_intervals(build_report())
    tiers = {row[0]: row for row in tables.tier_table(report).rows}
    assert tiers["T3"][2:4] == ("58.8% (53.8 to 63.8)", "2.0% (0.0 to 7.0)")
    attack = tables.attack_table(report).rows[5]
    assert attack[3:5] == ("41.2% (36.2 to 46.2)", "96.5% (91.5 to 100.0)")
    assert tables.utility_cost(report) == "0.6 points (-1.4 to 2.6) (control - standalone)"
    assert "(" not in tables.attack_table(build_report()).rows[5][3]
