"""Routing in an audit: every model given back by itself, and no tier moved by it."""

import pytest

from auditing.test_ledger import same
from trap2.auditing.arena import RELEASE, Arena
from trap2.auditing.audit import audit
from trap2.auditing.ledger import Ledger
from trap2.auditing.mixture import Mixture
from trap2.auditing.routing import routes
from trap2.auditing.verdict import retained_skill
from trap2.errors import UserError
from trap2.recipes import AuditSpec

PLAIN = {"attacks": ["task_arithmetic"], "t3_attacks": [], "relabel_rows": [6]}
ROUTING = {**PLAIN, "routing": ["emr", "tall_masks"]}


@pytest.fixture(scope="module")
def spec(shelf):
    return AuditSpec.model_validate(shelf.audit("lora", **ROUTING))


@pytest.fixture(scope="module")
def report(spec):
    return audit(spec)


def test_it_stands_apart_and_changes_nothing_else(shelf, report):
    plain = audit(AuditSpec.model_validate(shelf.audit("lora", **PLAIN)))
    assert [r.name for r in report.routing] == ["emr", "tall_masks"]
    assert plain.routing == []
    assert (report.tiers, report.attacks, report.verdict) == (
        plain.tiers,
        plain.attacks,
        plain.verdict,
    )


def test_every_model_is_read_off_its_own_mask(spec, report):
    arena = Arena(spec)
    refs = report.references
    for result in report.routing:
        params = tuple(result.params.items())
        own = Mixture(result.name, (RELEASE, "b"), (1.0, 1.0), params)
        partner = Mixture(result.name, ("b", RELEASE), (1.0, 1.0), params)
        assert result.accuracy == arena.evaluate(own, RELEASE, "test").accuracy
        assert result.partners == {"b": arena.evaluate(partner, "b", "test").accuracy}
        assert result.retained == retained_skill(result.accuracy, refs.base, refs.standalone)
        assert result.control_retained == retained_skill(
            result.control_accuracy, refs.control_base, refs.control
        )


def test_the_setting_is_the_best_on_validation_rows(spec, report):
    arena = Arena(spec)
    reached = {
        mixture.params: arena.evaluate(mixture, side, split).accuracy
        for mixture, side, split in routes(arena)
        if mixture.attack == "tall_masks" and side == RELEASE
    }
    chosen = report.routing[1].params
    assert len(reached) == 5
    assert reached[tuple(chosen.items())] == max(reached.values())


def test_a_ledger_gives_it_back(spec, report, tmp_path):
    with Ledger(tmp_path) as ledger:
        assert same(audit(spec, ledger=ledger), report)
        assert same(audit(spec, ledger=ledger), report)


def test_it_can_be_all_that_is_tried_and_goes_beside_a_suite(shelf):
    alone = {"attacks": [], "t3_attacks": [], "routing": ["emr"]}
    found = audit(AuditSpec.model_validate(shelf.audit("lora", **alone)))
    assert found.attacks == []
    assert [r.name for r in found.routing] == ["emr"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {**PLAIN, "routing": ["ties"]},
            "attacker.routing has 'ties', which merges models; move it to attacker.attacks",
        ),
        (
            {**PLAIN, "attacks": ["emr"]},
            "attacker.attacks has 'emr', which routes models; move it to attacker.routing",
        ),
        (
            {**PLAIN, "t3_attacks": ["emr"]},
            "attacker.t3_attacks has 'emr', which routes models; move it to attacker.routing",
        ),
    ],
)
def test_what_merges_and_what_routes_are_kept_apart(shelf, changes, message):
    with pytest.raises(UserError) as caught:
        audit(AuditSpec.model_validate(shelf.audit("lora", **changes)))
    assert str(caught.value) == message
