"""From numbers to words, against values worked out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from reporting.samples import build_report
from trap2.auditing.verdict import (
    LIMITS,
    UNTESTED,
    has_skill,
    limits,
    retained_skill,
    sentence,
    tier_results,
    unmet,
    word,
)
from trap2.schema import AttackResult, References, Thresholds

FRACTIONS = st.floats(0, 1)


def references(base=0.5, standalone=0.9, control=0.92):
    return References(
        base=base,
        standalone=standalone,
        control=control,
        control_base=None if control is None else base,
        chance=0.25,
        relabelled=[],
        partners={"b": 0.8},
    )


def result(tier, retained, control=0.9, rows=0, name="ties"):
    return AttackResult(
        name=name,
        tier=tier,
        params={},
        merged=0.5,
        retained=retained,
        admissible=True,
        unconstrained_retained=retained,
        partners={},
        control_retained=control,
        relabel_rows=rows,
    )


@pytest.mark.parametrize(
    ("merged", "base", "standalone", "expected"),
    [
        (0.6, 0.5, 0.9, 0.25),
        (0.9, 0.5, 0.9, 1.0),
        (0.95, 0.5, 0.9, 1.0),
        (0.3, 0.5, 0.9, 0.0),
        (0.9, 0.5, 0.5, 0.0),
        (0.9, 0.5, 0.4, 0.0),
    ],
)
def test_retained_skill_is_the_share_above_the_base_kept_between_0_and_1(
    merged, base, standalone, expected
):
    assert retained_skill(merged, base, standalone) == pytest.approx(expected)


@given(FRACTIONS, FRACTIONS, FRACTIONS)
def test_retained_skill_is_always_a_share(merged, base, standalone):
    assert 0 <= retained_skill(merged, base, standalone) <= 1


def test_each_tier_includes_the_ones_before_it():
    attacks = [
        result("T1", 0.30, control=0.8, name="task_arithmetic"),
        result("T1", 0.10, control=0.9, name="ties"),
        result("T2", 0.20, control=0.7, rows=30),
        result("T2", 0.05, control=0.95, rows=300),
        result("T3", 0.85, control=0.6, rows=300, name="task_arithmetic"),
        result("T3", 0.40, control=0.6, rows=0, name="task_arithmetic"),
    ]
    tiers = tier_results(attacks, references())
    assert list(tiers) == ["T1", "T2", "T3"]
    found = {t: (r.unmergeability, r.worst_attack) for t, r in tiers.items()}
    assert found == {
        "T1": (pytest.approx(0.70), "task_arithmetic"),
        "T2": (pytest.approx(0.70), "task_arithmetic"),
        "T3": (pytest.approx(0.15), "task_arithmetic"),
    }
    assert [r.control_unmergeability for r in tiers.values()] == pytest.approx([0.1, 0.05, 0.05])
    assert tiers["T2"].by_rows == pytest.approx({"30": 0.80, "300": 0.95})
    assert tiers["T2"].control_by_rows == pytest.approx({"30": 0.30, "300": 0.05})
    assert tiers["T3"].by_rows == pytest.approx({"300": 0.15, "0": 0.60})
    assert [r.verdict for r in tiers.values()] == ["leaks", "leaks", "broken"]


def test_a_tier_without_attacks_is_left_out_and_one_without_control_says_nothing_of_it():
    tiers = tier_results([result("T2", 0.1, control=None, rows=30)], references(control=None))
    assert list(tiers) == ["T2"]
    assert tiers["T2"].control_unmergeability is None
    assert tiers["T2"].control_by_rows == {}
    assert tiers["T2"].verdict == "holds"
    assert tier_results([], references()) == {}


def test_the_first_of_equally_bad_attacks_is_named():
    attacks = [result("T1", 0.5, name="slerp"), result("T1", 0.5, name="ties")]
    assert tier_results(attacks, references())["T1"].worst_attack == "slerp"


@pytest.mark.parametrize(
    ("low", "high", "control", "skill", "expected"),
    [
        (0.80, 1.00, 0.1, True, "holds"),
        (0.79, 1.00, 0.1, True, "inconclusive"),
        (0.79, 0.79, 0.1, True, "leaks"),
        (0.20, 0.79, 0.1, True, "leaks"),
        (0.20, 0.80, 0.1, True, "inconclusive"),
        (0.19, 0.79, 0.1, True, "inconclusive"),
        (0.00, 0.19, 0.1, True, "broken"),
        (0.00, 0.20, 0.1, True, "inconclusive"),
        (0.00, 1.00, 0.1, True, "inconclusive"),
        (1.00, 1.00, 0.7, True, "holds"),
        (1.00, 1.00, 0.71, True, "nothing to protect"),
        (0.00, 1.00, 0.71, True, "nothing to protect"),
        (1.00, 1.00, None, True, "holds"),
        (1.00, 1.00, 0.1, False, "nothing to protect"),
        (0.00, 1.00, None, False, "nothing to protect"),
    ],
)
def test_one_word_for_each_tier_on_which_both_ends_agree(low, high, control, skill, expected):
    assert word((low, high), control, skill, Thresholds()) == expected


@pytest.mark.parametrize(
    ("thresholds", "expected"),
    [
        ({"holds": 0.5}, "holds"),
        ({"holds": 0.5, "broken": 0.5}, "holds"),
        ({"broken": 0.7}, "broken"),
        ({"mergeable": 0.91}, "nothing to protect"),
    ],
)
def test_the_words_begin_where_the_audit_says(thresholds, expected):
    assert word((0.5, 0.6), 0.1, True, Thresholds(**thresholds)) == expected


def test_thresholds_are_in_order():
    with pytest.raises(ValidationError, match=r"broken=0.6 is above holds=0.5; lower it"):
        Thresholds(holds=0.5, broken=0.6)


@given(FRACTIONS, FRACTIONS, FRACTIONS, FRACTIONS)
def test_a_narrower_interval_never_takes_a_word_back(low, high, holds, broken):
    low, high = sorted((low, high))
    thresholds = Thresholds(holds=max(holds, broken), broken=min(holds, broken))
    whole = word((low, high), None, True, thresholds)
    for inside in (low, (low + high) / 2, high):
        narrow = word((inside, inside), None, True, thresholds)
        assert narrow != "inconclusive"
        assert whole in (narrow, "inconclusive")


def test_the_intervals_of_a_tier_decide_its_word_and_are_told():
    spreads = {"T1": ((0.75, 0.95), (0.02, 0.2)), "T2": ((0.81, 0.9), None)}
    attacks = [result("T1", 0.15), result("T2", 0.15, rows=30)]
    tiers = tier_results(attacks, references(), Thresholds(), spreads)
    assert [t.verdict for t in tiers.values()] == ["inconclusive", "holds"]
    assert (tiers["T1"].interval, tiers["T1"].control_interval) == spreads["T1"]
    assert (tiers["T2"].interval, tiers["T2"].control_interval) == spreads["T2"]
    said = sentence(references(), 0.02, tiers)
    assert "keeps 15 % of the skill (95 % interval 5 to 25 %), of the control's 90 %" in said
    assert said.endswith(
        "Words are of the whole interval: holds from an unmergeability of 80 % up, "
        "broken under 20 %, leaks between, inconclusive across."
    )
    other = sentence(references(), 0.02, tiers, Thresholds(holds=0.95, broken=0.5))
    assert "unmergeability of 95 % up, broken under 50 %, leaks between" in other


def test_a_tier_without_an_interval_is_no_surer_than_those_it_includes():
    attacks = [result("T4", 0.15), result("T5", 0.15)]
    for low, expected in ((0.75, "inconclusive"), (0.82, "holds")):
        spreads = {"T4": ((low, 0.95), None)}
        tiers = tier_results(attacks, references(), Thresholds(), spreads)
        assert tiers["T5"].verdict == expected
        assert tiers["T5"].interval is None
    worse = tier_results([attacks[0], result("T5", 0.9)], references(), Thresholds(), spreads)
    assert worse["T5"].verdict == "broken"


def report_of(tiers):
    return build_report().model_copy(update={"tiers": tiers})


REQUIRED = [
    ({"T1": 0.8}, []),
    ({}, []),
    (
        {"T1": 0.81, "T2": 0.8},
        [
            "T1 has unmergeability 0.850, lower end of its 95 % interval 0.800, 0.81 is required",
            "T2 has unmergeability 0.750, no interval, 0.8 is required",
        ],
    ),
    ({"T3": 0}, ["T3 was not tested, 0 is required"]),
]


@pytest.mark.parametrize(("required", "reasons"), REQUIRED)
def test_what_is_required_is_required_of_the_lower_end(required, reasons):
    attacks = [result("T1", 0.15), result("T2", 0.25, rows=30)]
    report = report_of(
        tier_results(attacks, references(), Thresholds(), {"T1": ((0.8, 0.9), (0.0, 0.2))})
    )
    assert unmet(report, required) == reasons


def test_where_there_is_nothing_to_protect_nothing_is_met():
    report = report_of(tier_results([result("T1", 0.0, control=0.1)], references()))
    assert report.tiers["T1"].unmergeability == 1
    assert unmet(report, {"T1": 0.5}) == ["T1 has nothing to protect, 0.5 is required"]


def test_a_release_that_is_no_better_than_its_base_has_nothing_to_protect():
    for standalone in (0.5, 0.4):
        known = references(standalone=standalone)
        assert not has_skill(known)
        tiers = tier_results([result("T1", 0.0)], known)
        assert tiers["T1"].verdict == "nothing to protect"
        said = sentence(known, 0.92 - standalone, tiers)
        assert "has no skill above its base (50.0 %)" in said
        assert f"As released it reaches {100 * standalone:.1f} % and" in said
    assert has_skill(references())
    assert "no skill" not in sentence(references(), 0.02, {})


def test_a_control_that_hardly_merges_leaves_nothing_to_protect():
    tiers = tier_results([result("T1", 0.0, control=0.2)], references())
    assert tiers["T1"].verdict == "nothing to protect"
    assert "T1 nothing to protect" in sentence(references(), 0.02, tiers)


def test_the_sentence_holds_every_number():
    attacks = [result("T1", 0.07, control=0.93), result("T3", 0.61, control=0.97, rows=30)]
    said = sentence(references(), 0.02, tier_results(attacks, references()))
    for part in ("90.0 %", "92.0 %", "+2.0 points", "keeps 7 %", "93 %", "keeps 61 %", "97 %"):
        assert part in said
    assert "T1 holds: " in said
    assert "T3 leaks: " in said
    assert "T2" not in said
    assert said.endswith(".")
    assert ".." not in said


def test_without_a_control_the_sentence_speaks_of_none():
    known = references(control=None)
    said = sentence(known, None, tier_results([result("T1", 0.1, control=None)], known))
    assert "control" not in said
    assert "utility cost" not in said
    assert said.startswith("As released it reaches 90.0 %. T1 holds: ")


def test_the_limits_of_every_report_are_whole_sentences():
    assert len(limits([])) >= 5
    assert all(limit[0].isupper() and limit.endswith(".") for limit in limits([]))


def test_what_was_tried_is_no_limit():
    assert limits([*UNTESTED]) == LIMITS
    assert limits(["distil", "probe"]) == [
        *LIMITS,
        "Fine-tuning the release before merging it was not tested here.",
        "Fine-tuning the merged model was not tested here.",
    ]


def test_the_sentence_says_what_is_kept_when_partners_do_not_matter():
    free = result("T1", 0.1).model_copy(update={"unconstrained_retained": 0.8})
    tiers = tier_results([free, result("T2", 0.1, rows=300)], references())
    assert [tier.partners_ignored for tier in tiers.values()] == [0.8, 0.8]  # T2 includes T1
    said = sentence(references(), 0.02, tiers)
    assert said.count("and 80 % if the partners do not matter") == 2
    assert "do not matter" not in sentence(
        references(), 0.02, tier_results([result("T1", 0.1)], references())
    )
