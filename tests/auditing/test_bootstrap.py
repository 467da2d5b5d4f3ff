"""Intervals, against a slow loop over resampled rows and against scipy's bootstrap."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from trap2.auditing.arena import CONTROL, RELEASE
from trap2.auditing.attacker import Catch
from trap2.auditing.bootstrap import (
    RESAMPLES,
    Bootstrap,
    interval,
    retained_share,
    spreads,
    unmergeability,
)
from trap2.auditing.mixture import Mixture
from trap2.auditing.verdict import retained_skill
from trap2.tasks.relabel import relabelled_accuracy

MIXTURE = Mixture("task_arithmetic", (RELEASE, "b"), (0.5, 0.7))


def catch(mixture=MIXTURE, rows=0, admissible=True):
    return Catch("task_arithmetic", rows, mixture, admissible, 0.0, 0.0, {}, {})


def correct(arena, s):
    return arena.evaluate(arena.alone(RELEASE, s), RELEASE, "test").scores.double().numpy()


def test_every_resample_counts_the_same_rows_everywhere(arenas):
    """The slow way: rows drawn one by one, in a loop, every accuracy from those rows."""
    arena = arenas["full"]
    bootstrap = Bootstrap(arena)
    merged = arena.evaluate(MIXTURE, RELEASE, "test").scores.double().numpy()
    base, alone = correct(arena, 0.0), correct(arena, 1.0)
    retained = bootstrap.retained(RELEASE, {("x", "T1", 0): catch()})["x", "T1", 0]
    assert retained.shape == (2, RESAMPLES + 1)
    for place in (0, 1, 2, RESAMPLES):
        drawn = np.repeat(np.arange(24), bootstrap._counts[place].astype(int))
        assert len(drawn) == 24
        m, a0, a1 = (known[drawn].mean() for known in (merged, base, alone))
        expected = [retained_skill(m, a0, a1)] * 2 if a1 > a0 else [0.0, 1.0]
        assert retained[:, place] == pytest.approx(expected)
    assert np.array_equal(bootstrap._counts[0], np.ones(24))  # the first is the sample itself


def test_relabelled_rows_are_resampled_under_one_map(arenas):
    arena = arenas["lora"]
    bootstrap = Bootstrap(arena)
    for rows in (6, 20):
        found = bootstrap.accuracy(MIXTURE, RELEASE, rows)
        fit, test = (arena.evaluate(MIXTURE, RELEASE, s) for s in ("validation", "test"))
        assert found[0] == relabelled_accuracy(fit, test, rows)
        assert found is bootstrap.accuracy(MIXTURE, RELEASE, rows)


def test_a_merge_that_does_not_count_is_the_base(arenas):
    bootstrap = Bootstrap(arenas["full"])
    keys = {("x", "T1", 0): catch(admissible=False)}
    assert (bootstrap.retained(RELEASE, keys)["x", "T1", 0][0] == 0).all()


def test_draws_depend_on_the_seed_alone(arenas):
    first, second = (Bootstrap(arenas["lora"])._counts for _ in range(2))
    assert np.array_equal(first, second)
    assert (first.sum(1) == 24).all()


def test_the_interval_of_an_accuracy_is_that_of_scipy(arenas):
    arena = arenas["full"]
    rows = correct(arena, 1.0)
    found = interval(np.stack([Bootstrap(arena).accuracy(arena.alone(RELEASE), RELEASE, 0)] * 2))
    known = stats.bootstrap((rows,), np.mean, method="percentile", n_resamples=20_000, rng=0)
    low, high = known.confidence_interval
    assert found == pytest.approx((low, high), abs=1.01 / 24)  # one row


def test_the_interval_covers_as_often_as_it_says():
    """Normal approximation, 200 rows: about 95 of 100 intervals hold the true accuracy."""
    draw = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        rows = draw.random(200) < 0.7
        counts = draw.multinomial(200, np.full(200, 1 / 200), 1000)
        means = np.concatenate([[rows.mean()], counts @ rows / 200])
        low, high = interval(np.stack([means] * 2))
        covered += low <= 0.7 <= high
    assert 180 <= covered <= 199


SHARES = st.lists(st.floats(0, 1), min_size=3, max_size=3)


@given(SHARES, SHARES, SHARES)
def test_the_share_is_that_of_the_verdict_or_anything(merged, base, standalone):
    found = retained_share(*map(np.array, (merged, base, standalone)))
    for place, (m, a0, a1) in enumerate(zip(merged, base, standalone, strict=True)):
        expected = [retained_skill(m, a0, a1)] * 2 if a1 > a0 else [0, 1]
        assert found[:, place] == pytest.approx(expected)


def test_in_every_resample_the_worst_attack_counts():
    one = np.array([[0.1, 0.5, 0.0], [0.1, 0.5, 1.0]])
    other = np.array([[0.3, 0.2, 0.0], [0.3, 0.2, 1.0]])
    expected = np.array([[0.7, 0.5, 0.0], [0.7, 0.5, 1.0]])
    assert unmergeability([one, other]) == pytest.approx(expected)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=30))
def test_an_interval_is_in_order_and_holds_the_sample(values):
    found = np.stack([np.array(values)] * 2)
    low, high = interval(found)
    assert low <= values[0] <= high
    assert min(values) <= low
    assert high <= max(values)


def test_where_skill_is_often_absent_the_interval_says_nothing():
    draw = np.random.default_rng(0)
    base, alone = draw.normal(0.5, 0.03, 500), draw.normal(0.52, 0.03, 500)
    assert interval(retained_share(base, base, alone)) == (0.0, 1.0)


def test_each_tier_includes_the_ones_before_it():
    def sure(value):
        return np.full((2, 5), value)

    release = {("a", "T1", 0): sure(0.4), ("a", "T3", 0): sure(0.1), ("b", "T3", 6): sure(0.6)}
    control = {key: sure(0.9) for key in release}
    found = spreads({RELEASE: release, CONTROL: control})
    assert list(found) == ["T1", "T3"]
    assert found["T1"] == (pytest.approx((0.6, 0.6)), pytest.approx((0.1, 0.1)))
    assert found["T3"] == (pytest.approx((0.4, 0.4)), pytest.approx((0.1, 0.1)))
    assert spreads({RELEASE: release})["T1"] == (pytest.approx((0.6, 0.6)), None)
