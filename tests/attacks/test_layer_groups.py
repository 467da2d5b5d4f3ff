"""Groups of layers by hand, and what they are with equal factors."""

import torch

from trap2.attacks.attack import merge

NAMES = ("embeddings.weight", *(f"layer.{place}.w" for place in range(7)))
ONE = {name: torch.tensor([[1.0, 2.0], [3.0, 4.0]]) for name in NAMES}
TWO = {name: torch.tensor([[4.0, 3.0], [2.0, 1.0]]) for name in NAMES}


def test_by_hand():
    # Of layers 0 to 6, 0 and 1 lie before a third of the way, 5 and 6 behind two thirds.
    merged = dict(merge("layer_groups", [ONE, TWO], [2.0, -1.0], early=0.5, late=3.0))
    total = torch.tensor([[-2.0, 1.0], [4.0, 7.0]])
    factors = (0.5, 0.5, 0.5, 1.0, 1.0, 1.0, 3.0, 3.0)
    for name, factor in zip(NAMES, factors, strict=True):
        assert torch.equal(merged[name], factor * total)


def test_with_equal_factors_it_is_task_arithmetic():
    level = dict(merge("layer_groups", [ONE, TWO], 0.7, early=1.0, late=1.0))
    for name, delta in merge("task_arithmetic", [ONE, TWO], 0.7):
        assert torch.equal(level[name], delta)
