from trap2.reporting import words


def test_differences_keep_their_sign_and_zero_has_none():
    assert words.points(-0.012) == "-1.2 points"
    assert words.points(-0.0001) == "0.0 points"


def test_intervals_stand_behind_their_value_and_gaps_are_dashes():
    assert words.percent(0.95, (0.931, 0.9694)) == "95.0% (93.1 to 96.9)"
    assert words.points(0.008, (-0.012, 0.028)) == "0.8 points (-1.2 to 2.8)"
    assert words.between((-0.0001, 0.0)) == "0.0 to 0.0"
    assert words.percent(None) == words.points(None) == words.NONE


def test_the_retained_interval_is_the_unmergeabilitys_turned_round():
    assert words.retained_interval((0.25, 0.75)) == (0.25, 0.75)
    assert words.retained_interval((0.5, 1.0)) == (0.0, 0.5)
    assert words.retained_interval(None) is None
