import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trap2.errors import UserError
from trap2.scales import WEIGHTINGS, ScaleLaw


@st.composite
def laws(draw: st.DrawFn) -> ScaleLaw:
    band = draw(st.floats(0.01, 0.4))
    return ScaleLaw(
        low=draw(st.floats(0.01, 0.99 - band)),
        high=1 + band + draw(st.floats(0.0, 3.0)),
        band=band,
        near=band + draw(st.floats(0.001, 2.0)),
        focus=draw(st.sampled_from([0.0, 0.5, 1.0])),
    )


@given(laws(), st.integers(0, 2**40), st.integers(0, 10**6), st.integers(1, 9))
def test_scales_stay_in_the_range_and_out_of_the_band(
    law: ScaleLaw, seed: int, step: int, count: int
) -> None:
    scales = law.draw(seed, step, count)
    assert len(scales) == count
    for s in scales:
        assert law.low <= s <= law.high * (1 + 1e-15)
        assert s <= 1 - law.band + 1e-15 or s >= 1 + law.band


@given(laws(), st.integers(0, 1000), st.integers(0, 1000), st.integers(1, 5))
def test_seed_and_step_alone_decide_the_scales(
    law: ScaleLaw, seed: int, step: int, count: int
) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = law.draw(seed, step, count)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert law.draw(seed, step, count) == first
    assert law.draw(seed, step + 1, count) != first
    assert law.draw(seed + 1, step, count) != first


@pytest.mark.parametrize("count", [1, 4])
def test_draws_follow_the_uniform_law_on_both_sides(count: int) -> None:
    law = ScaleLaw(low=0.05, high=2.0, band=0.05)
    draws = [s for step in range(4000 // count) for s in law.draw(7, step, count)]
    below, above = 0.90, 0.95
    share_below = sum(s < 1 for s in draws) / len(draws)
    assert share_below == pytest.approx(below / (below + above), abs=4 * 0.5 / math.sqrt(4000))
    inverse = [1 / s for s in draws]
    expected = (math.log(0.95 / 0.05) + math.log(2.0 / 1.05)) / (below + above)
    second_moment = (1 / 0.05 - 1 / 0.95 + 1 / 1.05 - 1 / 2.0) / (below + above)
    error = math.sqrt((second_moment - expected**2) / len(draws))
    assert sum(inverse) / len(inverse) == pytest.approx(expected, abs=4 * error)


def test_focus_draws_its_share_from_the_neighbourhood_of_one() -> None:
    law = ScaleLaw(low=0.2, high=1.6, band=0.05, near=0.3, focus=0.5)
    draws = [s for step in range(1000) for s in law.draw(1, step, 4)]
    # Half of all draws, and of the uniform rest the 0.5 of 1.3 that lie there as well.
    share = sum(abs(s - 1) <= 0.3 for s in draws) / len(draws)
    assert share == pytest.approx(0.5 + 0.5 * 0.5 / 1.3, abs=4 * 0.5 / math.sqrt(4000))
    only = ScaleLaw(low=0.2, high=1.6, band=0.05, near=0.3, focus=1.0)
    assert all(abs(s - 1) <= 0.3 for step in range(200) for s in only.draw(1, step, 2))


@pytest.mark.parametrize(
    ("values", "wording"),
    [
        ({"focus": 1.5, "near": 0.3}, "focus=1.5, near=0.3"),
        ({"focus": 0.5, "near": 0.05}, "focus=0.5, near=0.05"),
    ],
)
def test_an_impossible_neighbourhood_is_refused(values: dict[str, float], wording: str) -> None:
    with pytest.raises(UserError) as caught:
        ScaleLaw(**values)
    assert str(caught.value).startswith(wording)
    assert "it needs 0 <= focus <= 1 and near > band (0.05)" in str(caught.value)


def test_several_scales_come_from_equal_shares_of_the_range() -> None:
    law = ScaleLaw(low=0.2, high=1.6, band=0.1)  # 0.7 below, 0.5 above: shares of 0.3
    for step in range(50):
        places = [s - 0.2 if s < 1 else s - 1.1 + 0.7 for s in law.draw(0, step, 4)]
        assert [int(place / 0.3) for place in places] == [0, 1, 2, 3]


@pytest.mark.parametrize(("weighting", "power"), [("inverse", 1), ("inverse_sqrt", 2)])
def test_weights_are_roots_of_the_inverse(weighting: str, power: int) -> None:
    law = ScaleLaw(weighting=weighting)
    for s in (0.05, 0.7, 2.0):
        assert law.weight(s) ** power == pytest.approx(1 / s, rel=1e-12)
    assert ScaleLaw(weighting="uniform").weight(0.3) == 1.0


@pytest.mark.parametrize(
    "values",
    [
        {"low": 0.0},
        {"low": -0.5},
        {"low": 0.96},
        {"band": 0.0},
        {"band": -0.1},
        {"high": 1.0},
        {"high": math.inf},
        {"low": math.nan},
        {"band": 0.9},
    ],
)
def test_an_empty_range_is_refused_with_values_and_rule(values: dict[str, float]) -> None:
    with pytest.raises(UserError) as caught:
        ScaleLaw(**values)
    (name, value), text = next(iter(values.items())), str(caught.value)
    assert f"{name}={value}" in text
    assert "it needs 0 < low < 1 - band and 1 + band <= high" in text


def test_an_unknown_weighting_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="weighting 'square' is unknown; use one of inverse, "):
        ScaleLaw(weighting="square")
    assert list(WEIGHTINGS) == ["inverse", "inverse_sqrt", "uniform"]


def test_the_focus_is_the_share_of_draws_near_one() -> None:
    law = ScaleLaw(low=0.2, high=1.6, band=0.05, near=0.25, focus=0.6)
    draws = [s for step in range(4000) for s in law.draw(3, step)]
    near = sum(abs(s - 1) <= 0.25 for s in draws) / len(draws)
    expected = 0.6 + 0.4 * (2 * 0.2) / (0.75 + 0.55)
    assert near == pytest.approx(expected, abs=0.03)
    assert min(draws) < 0.3
    assert max(draws) > 1.5


@pytest.mark.parametrize("values", [{"focus": 1.1}, {"focus": -0.1}, {"focus": 0.5, "near": 0.05}])
def test_an_empty_neighbourhood_is_refused_with_the_rule(values: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"it needs 0 <= focus <= 1 and near > band \(0.05\)"):
        ScaleLaw(**values)
