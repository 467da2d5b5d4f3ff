"""Where the attacker looks next, on lines of mixtures."""

from hypothesis import given
from hypothesis import strategies as st

from trap2.auditing.arena import Mixture
from trap2.auditing.search import halfway, moved, neighbours, peaks


def line(*values: float, density: float = 1.0) -> list[Mixture]:
    return [Mixture("ties", ("a", "b"), (v, v), (("density", density),)) for v in values]


def values(mixtures: list[Mixture]) -> list[float]:
    return [mixture.coefficients[0] for mixture in mixtures]


def test_neighbours_are_next_by_coefficient_and_of_equal_parameters():
    one, other = line(1.0, 0.0, 0.5), line(0.4, 0.6, density=0.2)
    assert values(neighbours(one[2], [*one, *other])) == [0.0, 1.0]
    assert values(neighbours(one[1], [*one, *other])) == [0.5]
    assert values(neighbours(other[0], [*one, *other])) == [0.6]
    assert neighbours(one[0], one[:1]) == []


def test_halfway_lies_between_also_on_a_way_from_one_model_to_another():
    assert values(halfway(line(0.1)[0], line(0.0, 0.1, 0.2))) == [0.05, 0.15]
    ends = [Mixture("slerp", ("a", "b"), (1 - t, t)) for t in (0.2, 0.5)]
    assert [m.coefficients for m in halfway(ends[0], ends)] == [(0.65, 0.35)]


def test_moved_changes_one_place():
    (mixture,) = line(0.5)
    assert [m.coefficients for m in moved(mixture, 1, [0.1, 2.0])] == [(0.5, 0.1), (0.5, 2.0)]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=9))
def test_peaks_are_the_local_optima_the_highest_first(levels):
    mixtures = line(*(place / 10 for place in range(len(levels))))
    height = dict(zip(mixtures, levels, strict=True))
    found = peaks(mixtures, height.__getitem__)
    padded = [-1, *levels, -1]
    expected = [
        m
        for place, m in enumerate(mixtures)
        if padded[place] <= padded[place + 1] >= padded[place + 2]
    ]
    assert sorted(values(found)) == values(expected)
    assert [height[m] for m in found] == sorted((height[m] for m in found), reverse=True)
    assert height[found[0]] == max(levels)
