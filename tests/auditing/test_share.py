"""What partners keep, and how far a part of the rows can be from all of them."""

import math
import random

import pytest
import torch

from trap2.auditing.share import ERROR, share_kept
from trap2.tasks.evaluation import Scored


def scored(*scores: float) -> Scored:
    return Scored(torch.tensor(scores, dtype=torch.float32)[:, None])


def test_the_share_is_the_mean_over_partners_and_on_all_rows_without_doubt():
    found = [scored(1, 0, 1, 0), scored(1, 1)]
    without = [scored(1, 1, 1, 1), scored(0.5, 0.5)]
    assert share_kept(found, without) == (pytest.approx((0.5 + 2) / 2), 0)


def test_the_doubt_is_serflings_bound_with_the_partners_variances_added():
    found = [scored(*[1.0] * 25), scored(*[1.0] * 50)]
    without = [scored(*[0.8] * 100), scored(*[0.5] * 200)]
    own = [(1 - 24 / 100) / (4 * 25) / 0.8**2, (1 - 49 / 200) / (4 * 50) / 0.5**2]
    expected = math.sqrt(2 * math.log(1 / ERROR) * sum(own) / 2**2)
    share, doubt = share_kept(found, without)
    assert share == pytest.approx((1 / 0.8 + 1 / 0.5) / 2)
    assert doubt == pytest.approx(expected)


def test_one_partner_seen_to_the_end_adds_no_doubt():
    half = share_kept([scored(1, 0), scored(1)], [scored(1, 1), scored(1, 1)])[1]
    both = share_kept([scored(1), scored(1)], [scored(1, 1), scored(1, 1)])[1]
    assert 0 < half == pytest.approx(both / math.sqrt(2))


def test_no_draw_of_many_is_further_off_than_the_doubt_and_some_are_half_as_far():
    draw = random.Random(0)
    scores = [float(draw.random() < 0.5) for _ in range(80)]
    whole, off = sum(scores) / len(scores), []
    for _ in range(2000):
        draw.shuffle(scores)
        share, doubt = share_kept([scored(*scores[:20])], [scored(*[1.0] * 80)])
        off.append((whole - share) / doubt)
    assert 0.5 < max(off) < 1
