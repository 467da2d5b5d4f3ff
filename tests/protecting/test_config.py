import math
from dataclasses import fields

import pytest
from transformers import HfArgumentParser, TrainingArguments

from trap2.errors import UserError
from trap2.protecting.config import Trap2Config
from trap2.scales import ScaleLaw


def test_the_settings_pass_through_the_argument_parser() -> None:
    parser = HfArgumentParser(Trap2Config)
    (default,) = parser.parse_args_into_dataclasses([])
    (given,) = parser.parse_args_into_dataclasses(
        ["--strength", "0.1", "--loss", "hinge", "--scales_per_step", "2", "--band", "0.2"]
    )
    assert default == Trap2Config()
    assert given == Trap2Config(strength=0.1, loss="hinge", scales_per_step=2, band=0.2)
    text = parser.format_help()
    for item in fields(Trap2Config):
        assert f"--{item.name}" in text
        assert item.metadata["help"]


def test_a_script_reads_the_settings_beside_the_trainers_own() -> None:
    parser = HfArgumentParser((TrainingArguments, Trap2Config))
    words = ["--output_dir", "x", "--warmup_steps", "7", "--warmup", "3", "--seed", "5"]
    arguments, trap2 = parser.parse_args_into_dataclasses(words)
    assert (arguments.warmup_steps, arguments.seed) == (7, 5)
    assert (trap2.warmup, trap2.scale_seed) == (3, 0)


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({"strength": -0.1}, "must be finite and 0 or more"),
        ({"strength": math.nan}, "must be finite and 0 or more"),
        ({"strength": math.inf}, "must be finite and 0 or more"),
        ({"readout_weight": -1.0}, "must be finite and 0 or more"),
        ({"ease": 1.0}, "must be 0 or greater than 1"),
        ({"ease": math.inf}, "must be 0 or greater than 1"),
        ({"spare": 1.0}, r"must lie in \[0, 1\)"),
        ({"fraction": 0.0}, r"must lie in \(0, 1\]"),
        ({"fraction": 1.1}, r"must lie in \(0, 1\]"),
        ({"min_rows": 0}, "must be 1 or more"),
        ({"memory": -1}, "must be 0 or more"),
        ({"scales_per_step": 0}, "must be 1 or more"),
        ({"warmup": -1}, "must be 0 or more"),
        ({"ramp": -5}, "must be 0 or more"),
        ({"closing": -1}, "must be 0 or more"),
        ({"surrogate_share": 0.0}, r"must lie in \(0, 1\]"),
        ({"surrogate_count": -1}, "must be 0 or more"),
    ],
)
def test_values_out_of_range_are_refused_with_the_rule(values: dict, rule: str) -> None:
    ((name, value),) = values.items()
    with pytest.raises(UserError, match=f"^{name}={value} is out of range; it {rule}$"):
        Trap2Config(**values)


def test_an_impossible_scale_range_is_refused_when_it_is_set() -> None:
    with pytest.raises(UserError, match=r"scale range low=1\.2, band=0\.1, high=1\.6 is empty"):
        Trap2Config(low=1.2)
    with pytest.raises(UserError, match="weighting 'invers' is unknown"):
        Trap2Config(weighting="invers")


def test_an_unknown_trap_loss_is_refused_with_a_suggestion() -> None:
    with pytest.raises(
        UserError, match="no trap loss is called 'unlikelyhood'; did you mean 'unlikelihood'"
    ):
        Trap2Config(loss="unlikelyhood")


def test_the_trap_waits_for_the_warm_up_and_then_ramps_linearly() -> None:
    config = Trap2Config(strength=0.6, warmup=3, ramp=4)
    strengths = [config.strength_at(step) for step in range(9)]
    assert strengths == pytest.approx([0, 0, 0, 0.15, 0.3, 0.45, 0.6, 0.6, 0.6])
    assert strengths[:3] == [0.0, 0.0, 0.0]
    assert Trap2Config(strength=0.6, warmup=0, ramp=0).strength_at(0) == 0.6


def test_every_step_has_its_passes_once_the_trap_has_begun() -> None:
    config = Trap2Config(warmup=3, ramp=0, scales_per_step=4)
    assert [config.passes_at(step) for step in range(6)] == [0, 0, 0, 4, 4, 4]
    assert [Trap2Config(warmup=1).passes_at(step) for step in range(4)] == [0, 1, 1, 1]
    assert Trap2Config(strength=0.0, warmup=0).passes_at(0) == 0


def test_the_law_is_the_configured_one() -> None:
    settings = {"low": 0.3, "high": 1.2, "band": 0.1, "near": 0.2, "focus": 0.4}
    config = Trap2Config(**settings, weighting="inverse_sqrt", warmup=0, ramp=0, closing=0)
    assert config.law_at(0) == ScaleLaw(**settings, weighting="inverse_sqrt")


def test_the_draws_close_in_on_scale_1_after_the_ramp() -> None:
    config = Trap2Config(focus=0.4, warmup=2, ramp=3, closing=4)
    shares = [config.law_at(step).focus for step in range(11)]
    assert shares == pytest.approx([0, 0, 0, 0, 0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    far = [abs(config.law_at(4).draw(seed, 4)[0] - 1) > config.near for seed in range(200)]
    near = [abs(config.law_at(9).draw(seed, 9)[0] - 1) > config.near for seed in range(200)]
    assert sum(far) > 1.3 * sum(near)


def test_the_default_has_a_capped_trap_on_a_fifth_of_the_rows() -> None:
    default = Trap2Config.preset("default")
    assert default == Trap2Config() == Trap2Config(fraction=0.2, memory=128, cap=1.0, spare=0.25)
    assert [default.fewest_rows(n) for n in (1, 2, 4, 8)] == [6, 3, 2, 1]
    assert [default.fewest_rows(1, targets=t) for t in (0.5, 1.0, 2.5, 6.0, 900.0)] == [
        6,
        6,
        3,
        1,
        1,
    ]
    every = Trap2Config.preset("all_rows")
    assert every == Trap2Config(fraction=1.0, memory=0, cap=0.0, ease=0.0, spare=0.0)


def test_the_paper_preset_is_the_published_setting_and_can_be_changed() -> None:
    paper = Trap2Config.preset("paper")
    assert (paper.strength, paper.loss, paper.readout_weight) == (0.01, "ascent", 0.0)
    assert (paper.low, paper.high, paper.band, paper.weighting) == (0.05, 2.0, 0.05, "inverse")
    assert paper.law_at(0).focus == paper.law_at(10_000).focus == 0.0  # a uniform law
    assert (paper.fraction, paper.scales_per_step, paper.strength_at(0)) == (1.0, 1, 0.01)
    assert Trap2Config.preset("paper", strength=0.1, scale_seed=4) == Trap2Config.preset(
        "paper", scale_seed=4, strength=0.1
    )
    assert Trap2Config.preset("paper", low=0.1).low == 0.1
