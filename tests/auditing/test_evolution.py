"""CMA-ES: finds what single coefficients cannot, always the same, within its budget."""

import sys

import numpy as np
import pytest

from trap2.auditing.arena import RELEASE, Mixture
from trap2.auditing.attacker import Attacker
from trap2.auditing.audit import audit
from trap2.auditing.evolution import BOUNDS, evolved
from trap2.errors import UserError
from trap2.recipes import AttackerSpec, AuditSpec

pytest.importorskip("cma", reason="the extra `search` is not installed")


def valley(point):
    """A narrow valley along the diagonal: one coefficient alone leads out of it."""
    x, y, z = point
    return (x + y + z - 4.5) ** 2 + 100 * ((x - y) ** 2 + (y - z) ** 2)


def test_it_finds_what_one_coefficient_at_a_time_does_not():
    start = (0.5, 0.5, 0.5)
    moves = [(place, step) for place in range(3) for step in (0.3, -0.3)]
    alone = [valley((*start[:i], 0.5 + step, *start[i + 1 :])) for i, step in moves]
    assert min(alone) > valley(start)
    tried = evolved(start, [], valley, budget=300, seed=0)
    best = min(tried, key=valley)
    assert best == pytest.approx((1.5, 1.5, 1.5), abs=0.05)
    assert all(BOUNDS[0] <= c <= BOUNDS[1] for point in tried for c in point)


def test_it_is_the_same_for_a_seed_whatever_else_was_drawn():
    def go(seed):
        return evolved((0.5, 0.5, 0.5), [(1.0, 0.2, 0.2)], valley, budget=40, seed=seed)

    np.random.seed(1)
    first = go(0)
    before = np.random.get_state()[1].copy()
    again = go(0)
    assert (np.random.get_state()[1] == before).all()
    assert again == first
    assert go(1) != first


def test_it_tries_the_given_points_first_and_none_twice_or_beyond_the_budget():
    asked = []
    tried = evolved(
        (0.5, 0.5, 0.5),
        [(1.0, 0.2, 0.2), (1.0, 0.6, 0.6)],
        lambda point: asked.append(point) or valley(point),
        budget=25,
        seed=0,
    )
    assert asked == tried
    assert len(tried) == len(dict.fromkeys(tried)) == 25
    assert {(1.0, 0.2, 0.2), (1.0, 0.6, 0.6)} <= {*tried[:7]}


def test_one_coefficient_is_searched_for_too():
    tried = evolved((0.5,), [], lambda point: (point[0] - 1.2) ** 2, budget=60, seed=0)
    assert min(tried, key=lambda point: abs(point[0] - 1.2))[0] == pytest.approx(1.2, abs=0.02)


def searching(shelf, **changes):
    settings = {"t3_attacks": ["depth_thirds"], "t3_search": ["cma"], "t3_evolved": 12, "refine": 0}
    return AuditSpec.model_validate(shelf.audit("lora", **{**settings, **changes}))


def test_the_attacker_chooses_from_what_it_found(shelf):
    report = audit(searching(shelf))
    (found, *_) = [a for a in report.attacks if a.tier == "T3"]
    assert found.name == "depth_thirds"
    assert str(found.params["c[release]"]).count(" / ") in (0, 2)
    assert report.settings["t3_search"] == ["cma"]
    again = audit(searching(shelf))
    times = {"created", "seconds"}
    assert again.model_dump(exclude=times) == report.model_dump(exclude=times)
    tried = [p for p in report.frontier if p.attack == "depth_thirds"]
    assert len(tried) > 4
    assert all(isinstance(p.params[p.of], float) for p in tried)


def test_with_descent_it_tries_all_that_descent_tries_and_more(shelf):
    def explored(*search):
        attacker = Attacker(arena(shelf), RELEASE)
        attacker.arena.spec = searching(shelf, t3_attacks=["task_arithmetic"], t3_search=[*search])
        best = [catch.unconstrained for *_, catch in attacker.per_model("task_arithmetic")]
        return attacker.explored["task_arithmetic"], best

    first, _ = explored("descent")
    both, _ = explored("descent", "cma")
    assert [*both][: len(first)] == [*first]
    assert 0 < len(both) - len(first) <= 12
    start = Mixture("task_arithmetic", (RELEASE, "b"), (1.0, 0.2))
    assert start in both


def arena(shelf):
    from trap2.auditing.arena import Arena

    return Arena(searching(shelf))


def test_a_suite_searches_as_it_always_has():
    assert AttackerSpec(suite="standard-v1").t3_search == ["descent"]
    with pytest.raises(ValueError, match=r"attacker.t3_search is fixed by the suite 'quick'; rem"):
        AttackerSpec(suite="quick", t3_search=["cma"])
    own = AttackerSpec(t3_search=["descent", "cma"])
    assert own.suite is None


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(UserError, match=r"'cma', which needs .*; install trap2.search"):
        evolved((0.5,), [], lambda point: 0.0, budget=10, seed=0)
