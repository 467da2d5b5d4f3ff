"""LiNeS by hand, and what it is on a level line."""

import torch

from trap2.attacks.attack import merge

NAMES = ("embeddings.weight", "layer.0.w", "layer.1.w", "layer.2.w")
ONE = {name: torch.tensor([[1.0, 2.0], [3.0, 4.0]]) for name in NAMES}
TWO = {name: torch.tensor([[4.0, 3.0], [2.0, 1.0]]) for name in NAMES}


def test_by_hand():
    # 2 * ONE - TWO = [-2 1; 4 7], times 0.5, 0.5, 0.75, 1 from the first layer to the last
    merged = dict(merge("lines", [ONE, TWO], [2.0, -1.0], first=0.5))
    total = torch.tensor([[-2.0, 1.0], [4.0, 7.0]])
    for name, factor in zip(NAMES, (0.5, 0.5, 0.75, 1.0), strict=True):
        assert torch.equal(merged[name], factor * total)


def test_on_a_level_line_it_is_task_arithmetic():
    level = dict(merge("lines", [ONE, TWO], 0.7, first=1.0))
    for name, delta in merge("task_arithmetic", [ONE, TWO], 0.7):
        assert torch.equal(level[name], delta)
