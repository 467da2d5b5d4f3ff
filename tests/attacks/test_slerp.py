"""SLERP by hand, against mergekit, and at its ends."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trap2.attacks.attack import merge
from trap2.errors import UserError

QUICK = settings(deadline=None, max_examples=30)


def weights(a, b, t, base=None):
    """The merged weights: the base is zero unless given, so the updates are the weights."""
    base = torch.zeros_like(a) if base is None else base
    merged = merge("slerp", [{"w": a - base}, {"w": b - base}], t, base={"w": base})
    return base + dict(merged)["w"]


def test_by_hand():
    # a and b at a right angle, t = 1/3: sin(60 deg) a + sin(30 deg) b
    a, b = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 4.0]])
    expected = torch.tensor([[math.sqrt(3), 0.0], [0.0, 2.0]])
    torch.testing.assert_close(weights(a, b, 1 / 3), expected)
    base = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    torch.testing.assert_close(weights(a, b, 1 / 3, base), expected)


def test_nearly_colinear_tensors_and_zeros_are_interpolated_linearly():
    a = torch.tensor([1.0, 0.0])
    for b in (torch.tensor([1.0, 0.02]), torch.tensor([-1.0, 0.0]), torch.zeros(2)):
        torch.testing.assert_close(weights(a, b, 0.25), 0.75 * a + 0.25 * b)


@QUICK
@given(st.integers(0, 99), st.sampled_from([0.0, 1.0]))
def test_the_ends_are_the_models(seed, t):
    base, a, b = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(weights(a, b, t, base), b if t else a, rtol=0, atol=1e-6)


@QUICK
@given(st.integers(0, 99), st.floats(0, 1))
def test_exchanging_the_models_exchanges_t(seed, t):
    base, a, b = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(seed))
    there, back = weights(a, b, t, base), weights(b, a, 1 - t, base)
    torch.testing.assert_close(there, back, rtol=0, atol=1e-6)


@QUICK
@given(st.integers(0, 99), st.floats(0, 1))
def test_equal_norms_stay(seed, t):
    pair = torch.randn(2, 12, generator=torch.Generator().manual_seed(seed))
    a, b = pair / pair.norm(dim=1, keepdim=True)
    assert float(weights(a, b, t).norm()) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("spread", [1.0, 0.01])
def test_equals_mergekit(t, spread):
    mergekit = pytest.importorskip("mergekit.merge_methods.api")
    base, a, b = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(1))
    a, b = base + spread * a, base + spread * b
    theirs = mergekit.merge_tensors([a, b], "slerp", base_index=0, parameters={"t": t})
    torch.testing.assert_close(weights(a, b, t, base), theirs, rtol=0, atol=1e-6)


def test_a_tensor_one_model_has_starts_at_the_base():
    base = {"w": torch.tensor([1.0, 0.0])}
    merged = merge("slerp", [{}, {"w": torch.tensor([-1.0, 1.0])}], 0.5, base=base)
    half = math.sqrt(0.5)
    torch.testing.assert_close(base["w"] + dict(merged)["w"], torch.tensor([half, half]))


def test_coefficients_must_add_up_to_one():
    w = {"w": torch.ones(2)}
    message = r"coefficients \(1.0, 1.0\), which do not add up to 1; give 1 - t and t"
    with pytest.raises(UserError, match=message):
        list(merge("slerp", [w, w], [1.0, 1.0], base=w))
