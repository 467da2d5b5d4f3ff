"""Suites: each stays what it is, says what it fixes, and contradictions are refused."""

import hashlib
import json

import pytest

from trap2.attacks.attack import load_attacks
from trap2.auditing.plan import check_plan
from trap2.auditing.recovery import METHODS
from trap2.recipes import AttackerSpec
from trap2.suites import DATA_V1, QUICK, RECOVERY_V1, STANDARD_V1, SUITES, suite

DIGESTS = {
    "quick": "5162faafb572c203",
    "standard-v1": "eca4574f488aa7a9",
    "data-v1": "147c512141d37f18",
    "recovery-v1": "53571f559910ed6d",
    "mergekit-v1": "0a9c172c3e8a78b1",
    "peft-v1": "aa25836da6429636",
}
"""Of everything a suite fixes. A suite that changed is another one: give it a new version."""

TOOLS = {"mergekit-v1": "mergekit", "peft-v1": "peft"}
"""Suites whose merges another library makes."""


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_is_what_it_was(name):
    text = json.dumps([name, suite(name).settings()], sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == DIGESTS[name]


@pytest.mark.parametrize("name", SUITES)
def test_every_trial_is_of_an_attack_there_is(name):
    for trial in suite(name).trials:
        entry = load_attacks().get(trial.attack)
        assert [key for key, _ in trial.grid] == list(entry.grid), trial.attack
        assert not trial.per_model or "T3" in entry.tiers
        assert entry.needs_data == (name == "data-v1")
        assert (entry.tool.name if entry.tool else "") == TOOLS.get(name, "")
        assert any(trial.coefficients)


def test_t3_has_no_attack_that_decomposes_for_every_choice_of_coefficients():
    for one in SUITES.values():
        slow = ("iso_c", "iso_cts", "cart")
        assert not [t.attack for t in one.trials if t.per_model and t.attack in slow]


def test_the_coefficients_reach_from_0_beyond_1():
    for trial in STANDARD_V1.trials:
        assert trial.coefficients[0] == 0
        assert max(trial.coefficients) > 1 or trial.attack in ("slerp", "nuslerp")


def test_who_says_nothing_gets_the_quick_suite():
    spec = AttackerSpec()
    assert spec.suite == "quick"
    assert spec.attacks == [trial.attack for trial in QUICK.trials]
    assert AttackerSpec(validation_rows=20) == AttackerSpec(suite="quick", validation_rows=20)


def test_whoever_chooses_gets_no_suite():
    for own in ({"attacks": ["ties"]}, {"coefficients": [1.0]}, {"refine": 0}, {"budget": 9}):
        assert AttackerSpec.model_validate(own).suite is None
    assert AttackerSpec(refine=0).attacks == AttackerSpec().attacks
    assert AttackerSpec(refine=0).coefficients is None


def test_a_suite_fills_in_what_it_fixes_and_reads_its_own_record():
    spec = AttackerSpec(suite="standard-v1", partners_keep=0.9)
    assert spec.attacks[:2] == ["task_arithmetic", "ties"]
    assert spec.t3_attacks == [t.attack for t in STANDARD_V1.trials if t.per_model]
    assert spec.partners_keep == 0.9
    assert AttackerSpec.model_validate(spec.model_dump(mode="json")) == spec


def test_the_suites_of_t4_and_t5_try_all_there_is_of_their_tier():
    data = [name for name in load_attacks() if load_attacks().get(name).needs_data]
    assert sorted(trial.attack for trial in DATA_V1.trials) == data
    assert [*RECOVERY_V1.methods] == [*METHODS]


@pytest.mark.parametrize("name", TOOLS)
def test_the_suites_of_a_library_try_all_of_its_methods(name):
    attacks = load_attacks()
    known = [n for n in attacks if (t := attacks.get(n).tool) is not None and t.name == TOOLS[name]]
    assert sorted(trial.attack for trial in suite(name).trials) == known


@pytest.mark.parametrize("name", ["data-v1", "recovery-v1"])
def test_they_leave_the_other_tiers_out_and_read_their_own_record(name):
    spec = AttackerSpec(suite=name)
    assert (spec.attacks, spec.t3_attacks) == ([], [])
    assert bool(spec.data_attacks) != bool(spec.recovery)
    check_plan(spec, 4)
    assert AttackerSpec.model_validate(spec.model_dump(mode="json")) == spec
    for key, value in suite(name).settings().items():
        assert spec.model_dump()[key] == value


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"suite": "qick"}, "no suite is called 'qick'; did you mean 'quick'\\? known: quick, sta"),
        (
            {"suite": "quick", "attacks": ["ties"]},
            "attacker.attacks is fixed by the suite 'quick'; remove it, or the suite",
        ),
        (
            {"suite": "data-v1", "unlabelled_rows": 50},
            "attacker.unlabelled_rows is fixed by the suite 'data-v1'; remove it, or the suite",
        ),
        (
            {"suite": "recovery-v1", "recovery_steps": [30]},
            "attacker.recovery_steps is fixed by the suite 'recovery-v1'; remove it, or the suite",
        ),
        ({"suite": "quick", "refine": 2}, "attacker.refine is fixed by the suite 'quick'; remove"),
        ({"suite": 3}, "suite"),
    ],
)
def test_contradictions_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        AttackerSpec.model_validate(given)
