"""Tier T4 on real pico releases: exact at one model, nothing left behind, each merge made once."""

import pytest
import torch

from trap2.attacks.attack import load_attacks, merge
from trap2.auditing.arena import CONTROL, RELEASE, Arena, Mixture
from trap2.auditing.attacker import Attacker
from trap2.auditing.audit import audit
from trap2.auditing.ledger import Ledger
from trap2.recipes import AuditSpec

NAMES = [name for name in load_attacks() if load_attacks().get(name).needs_data]
NEUTRAL = {
    "alpha": 0.9,
    "seed": 0,
    "steps": 0,
    "layerwise": True,
    "learning_rate": 0.01,
    "scale": 1.0,
}
"""Hyper-parameters at which an attack leaves a single model alone."""


def mixture(name, members, c, **changes):
    grid = load_attacks().get(name).grid
    params = {key: changes.get(key, NEUTRAL[key]) for key in grid}
    return Mixture(name, members, (c,) * len(members), tuple(params.items()))


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_one_model_alone_keeps_its_logits(arenas, kind, name):
    arena = arenas[kind]
    expected = arena.evaluate(arena.alone(RELEASE), RELEASE, "test").logits
    found = arena.evaluate(mixture(name, (RELEASE,), 1.0), RELEASE, "test").logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=5e-3)


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_a_merge_is_made_once_and_leaves_the_base_to_the_bit(arenas, kind, name, monkeypatch):
    arena = arenas[kind]
    before = {n: v.clone() for n, v in arena.encoder.state_dict().items()}
    made = []
    real = Arena._merged

    def counted(self, mixture):
        made.append(mixture)
        return real(self, mixture)

    monkeypatch.setattr(Arena, "_merged", counted)
    mixed = mixture(name, (RELEASE, "b"), 0.6, steps=2)
    for member in (RELEASE, "b"):
        for split in ("validation", "test"):
            assert torch.isfinite(arena.evaluate(mixed, member, split).logits).all()
    assert made == [mixed]
    assert all(torch.equal(v, before[n]) for n, v in arena.encoder.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_the_same_merge_comes_out_twice(arenas, name):
    arena = arenas["lora"]
    members = (RELEASE, "b")
    chosen = mixture(name, members, 0.6, steps=2)
    found = []
    for _ in range(2):
        vectors = [dict(arena.members[m].update) for m in members]  # remembers nothing
        data = [arena.unlabelled(m) for m in members]
        found.append(
            dict(merge(name, vectors, 0.6, base=arena.base, data=data, **dict(chosen.params)))
        )
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


def test_it_sees_as_many_rows_as_it_may_and_no_labels(shelf):
    arena = Arena(AuditSpec.model_validate(shelf.audit("lora", unlabelled_rows=5)))
    data = arena.unlabelled(CONTROL)
    assert data.rows == 5
    assert data is arena.unlabelled(CONTROL)
    (batch,) = data.batches()
    assert set(batch) == {"input_ids", "attention_mask"}
    assert arena.unlabelled(CONTROL, 7).rows == 7
    assert Arena(AuditSpec.model_validate(shelf.audit("lora"))).unlabelled("b").rows == 24


def test_the_attacker_reads_such_merges_raw_and_re_labelled(arenas):
    found = list(Attacker(arenas["lora"], RELEASE).shared("regmean"))
    assert [(tier, rows) for tier, rows, _ in found] == [("T4", 0), ("T4", 6), ("T4", 20)]


def sees(shelf, **changes) -> AuditSpec:
    settings = {
        "attacks": ["task_arithmetic"],
        "t3_attacks": [],
        "data_attacks": ["fisher", "regmean"],
        "coefficients": [0.0, 1.0],
        "grids": {"regmean": {"alpha": [0.9]}},
        "unlabelled_rows": 8,
        "relabel_rows": [6],
    }
    return AuditSpec.model_validate(shelf.audit("lora", **{**settings, **changes}))


def test_a_merge_is_made_again_only_if_the_ledger_lacks_a_reading_of_it(
    shelf, tmp_path, monkeypatch
):
    def read(spec) -> list[list[float]]:
        arena = Arena(spec, ledger=ledger)
        logits = [
            arena.evaluate(mixed, member, split).logits.flatten().tolist()
            for member in (RELEASE, "b")
            for split in ("validation", "test")
        ]
        assert arena.evaluations == 4
        return logits

    made, real = [], Arena._merged
    monkeypatch.setattr(Arena, "_merged", lambda self, m: made.append(m) or real(self, m))
    mixed = mixture("regmean", (RELEASE, "b"), 0.6)
    with Ledger(tmp_path) as ledger:
        first = read(sees(shelf))
        assert read(sees(shelf)) == first
        assert made == [mixed]
        with ledger._open() as database:
            database.execute("DELETE FROM evaluations WHERE rowid = 3")
        assert read(sees(shelf)) == first
        assert made == [mixed] * 2
        assert read(sees(shelf, unlabelled_rows=5)) != first
        assert made == [mixed] * 3


def test_an_audit_with_a_ledger_ends_in_the_same_record(shelf, tmp_path):
    spec = sees(shelf, recovery=["probe"], recovery_rows=[6], recovery_steps=[1])
    with Ledger(tmp_path) as ledger:
        records = [audit(spec, ledger=known) for known in (None, ledger, ledger)]
    times = {"created", "seconds"}
    first, *others = [record.model_dump_json(exclude=times) for record in records]
    assert others == [first] * 2


def test_an_audit_with_such_attacks_records_tier_and_rows(shelf):
    report = audit(sees(shelf))
    assert list(report.tiers) == ["T1", "T2", "T4"]
    assert [(a.name, a.relabel_rows) for a in report.attacks if a.tier == "T4"] == [
        *(("fisher", 0), ("fisher", 6), ("regmean", 0), ("regmean", 6))
    ]
    assert report.rows["unlabelled"] == 8
    assert report.settings["unlabelled_rows"] == 8
    assert report.evidence.grids["regmean"] == {"coefficient": [0.0, 1.0], "alpha": [0.9]}
    assert "T4 " in report.verdict
    assert report.tiers["T4"].interval is not None
    for attack in report.attacks:
        assert attack.interval[0] <= attack.retained <= attack.interval[1]
