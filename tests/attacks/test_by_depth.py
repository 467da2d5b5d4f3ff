"""A coefficient per model and part of the depth: by hand, and task arithmetic if all are equal."""

import pytest
import torch

from trap2.attacks.attack import load_attacks, merge
from trap2.errors import UserError

NAMES = ["embed.weight", *(f"layer.{place}.weight" for place in range(4))]
ONE, OTHER = ({name: torch.full((2,), value) for name in NAMES} for value in (1.0, 100.0))


def test_every_third_has_its_own_coefficient_of_each_model():
    found = dict(merge("depth_thirds", [ONE, OTHER], [1.0, 2.0, 3.0, 0.1, 0.2, 0.3]))
    # Depths of the layers: 0, 1/3, 2/3, 1.
    expected = [11.0, 11.0, 22.0, 33.0, 33.0]
    assert [float(found[name][0]) for name in NAMES] == pytest.approx(expected)


def test_six_layers_have_six_coefficients():
    update = {f"layer.{place}.weight": torch.ones(1) for place in range(6)}
    found = dict(merge("depth_sixths", [update], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))
    assert [float(found[f"layer.{place}.weight"]) for place in range(6)] == [*range(1, 7)]


@pytest.mark.parametrize("name", ["depth_thirds", "depth_sixths"])
def test_equal_coefficients_are_task_arithmetic(name):
    found = dict(merge(name, [ONE, OTHER], 0.7))
    expected = dict(merge("task_arithmetic", [ONE, OTHER], 0.7))
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    entry = load_attacks().get(name)
    assert len(entry.shared(0.7, 2)) == 2 * entry.parts
    assert entry.tiers == ("T3",)


def test_one_coefficient_per_model_is_too_few():
    with pytest.raises(UserError, match=r"got 2 coefficients for 2 models; give one .* or 3 per"):
        merge("depth_thirds", [ONE, OTHER], [1.0, 2.0])
