"""DARE by hand, its masks, and that it leaves the caller's random stream alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trap2.attacks import dare
from trap2.attacks.attack import merge
from trap2.errors import UserError

QUICK = settings(deadline=None, max_examples=30)

ONE = {"w": torch.tensor([[1.0, -2.0], [3.0, 4.0]])}
TWO = {"w": torch.tensor([[5.0, 6.0], [-7.0, 8.0]])}


def dared(updates, coefficients, drop=0.5, seed=0):
    return dict(merge("dare_ties", updates, coefficients, drop=drop, seed=seed))


def test_by_hand(monkeypatch):
    # Masks [1 1; 1 0] and [0 1; 1 1], p = 0.5, so what stays is doubled:
    # D1 = [2 -4; 6 0], D2 = [0 12; -14 16]; sum [2 8; -8 16]; agreeing {1} {2} {2} {2}
    # dW = [2 12; -14 16]
    masks = iter([torch.tensor([[1, 1], [1, 0]]).bool(), torch.tensor([[0, 1], [1, 1]]).bool()])
    monkeypatch.setattr(dare, "keep_mask", lambda *_: next(masks))
    merged = dared([ONE, TWO], 1.0)["w"]
    assert torch.equal(merged, torch.tensor([[2.0, 12.0], [-14.0, 16.0]]))


def test_without_drop_it_is_ties_without_trimming():
    expected = dict(merge("ties", [ONE, TWO], [0.3, 0.9], density=1.0))["w"]
    assert torch.equal(dared([ONE, TWO], [0.3, 0.9], drop=0.0)["w"], expected)


@QUICK
@given(st.integers(0, 1000), st.sampled_from([0.1, 0.5, 0.9]))
def test_the_seed_decides_and_no_stream_moves(seed, drop):
    update = {"w": torch.linspace(1, 2, 64)}
    torch.manual_seed(seed)
    before = torch.random.get_rng_state()
    first = dared([update], 1.0, drop, seed)["w"]
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(dared([update], 1.0, drop, seed)["w"], first)
    kept = first != 0
    torch.testing.assert_close(first[kept], (update["w"] / (1 - drop))[kept])


def test_masks_differ_by_seed_model_and_tensor():
    ones = torch.ones(64)
    masks = [dare.keep_mask(ones, 0.5, key) for key in ("0 0 w", "1 0 w", "0 1 w", "0 0 v")]
    for i, mask in enumerate(masks):
        assert all(not torch.equal(mask, other) for other in masks[i + 1 :])


def test_the_share_dropped_and_the_mean_are_right():
    merged = dared([{"w": torch.ones(100_000)}], 1.0, drop=0.9)["w"]
    assert float((merged == 0).float().mean()) == pytest.approx(0.9, abs=0.005)
    assert float(merged.mean()) == pytest.approx(1.0, abs=0.05)


def test_two_equal_updates_get_two_masks():
    ones = {"w": torch.ones(10_000)}
    kept = dared([ones, ones], 1.0, drop=0.5)["w"] != 0
    assert float(kept.float().mean()) == pytest.approx(0.75, abs=0.02)


def test_a_mask_does_not_depend_on_the_other_models_coefficients():
    alone = dared([ONE, TWO], [1.0, 0.0])["w"]
    assert torch.equal(alone, dared([ONE], 1.0)["w"])


def test_scale():
    assert torch.equal(4 * dared([ONE, TWO], 0.5)["w"], dared([ONE, TWO], 2.0)["w"])


@pytest.mark.parametrize("drop", [1.0, -0.1])
def test_drop_out_of_range(drop):
    with pytest.raises(UserError, match=f"drop={drop} leaves nothing .* such as 0.9"):
        dared([ONE], 1.0, drop)
