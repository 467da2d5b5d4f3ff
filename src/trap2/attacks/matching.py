"""Which block of a release is which of the base: weight matching.

Symbols: X_i, Y_i parts of block i of a release that meet, with one row a dimension of the block;
X0_j, Y0_j of block j of the base; Z, Z0 parts that cannot change their basis.

Blocks i and j are the more alike the larger

    cos(X_i' Y_i, X0_j' Y0_j) + ... + cos(Z_i, Z0_j) + ...

summed over the pairs and fixed parts of a layer. X' Y is the same in every basis of the block, so
heads are matched before their basis is known, and units of a GLU whatever their scale.
With the residual stream in its place, layers are independent and each is one linear assignment.
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from trap2.attacks.anatomy import Layer, Part, Read

TIE = 1e-9
"""A gain in likeness that is rounding."""


def order(layer: Layer, released: Read, base: Read) -> Tensor | None:
    """Which block of the release takes each place of the base.

    Blocks that share keys and values stay together (two levels: within groups, then groups).

    Args:
        layer: The layer.
        released: Reads the release's tensors.
        base: Reads the base's.

    Returns:
        (blocks,) indices; None where every block is in its place.
    """
    likeness = _likeness(layer, released, base)
    places = torch.arange(len(likeness))
    size = len(likeness) // layer.groups
    found = assigned(likeness) if size == 1 else _by_groups(likeness, layer.groups, size)
    gain = likeness[found, places].sum() - likeness.diagonal().sum()
    return found if gain > TIE * len(likeness) else None


def assigned(likeness: Tensor) -> Tensor:
    """The row for each column that makes the sum largest (Git Re-Basin, arXiv 2209.04836).

    Args:
        likeness: (N, N) of every row with every column.
    """
    rows, columns = linear_sum_assignment(likeness.numpy(), maximize=True)
    found = torch.empty(len(likeness), dtype=torch.long)
    found[torch.as_tensor(columns)] = torch.as_tensor(rows)
    return found


def cosines(one: Tensor, other: Tensor) -> Tensor:
    """Cosine of every block (N, h, m) of one with every block of the other, (N, N)."""
    return F.normalize(one.flatten(1), dim=1) @ F.normalize(other.flatten(1), dim=1).T


def _by_groups(likeness: Tensor, groups: int, size: int) -> Tensor:
    """Blocks matched within every pair of groups, then groups by what that gives (2505.22697)."""
    tiles = likeness.reshape(groups, size, groups, size).transpose(1, 2)
    inner = [[assigned(tile) for tile in row] for row in tiles]
    gains = [
        [tile[found, torch.arange(size)].sum() for tile, found in zip(row, matched, strict=True)]
        for row, matched in zip(tiles, inner, strict=True)
    ]
    outer = assigned(torch.tensor(gains)).tolist()
    return torch.cat([group * size + inner[group][place] for place, group in enumerate(outer)])


def _likeness(layer: Layer, released: Read, base: Read) -> Tensor:
    def split(part: Part, read: Read) -> Tensor:
        return part.split(read).repeat_interleave(layer.blocks // part.blocks, 0)

    total = torch.zeros(layer.blocks, layer.blocks, dtype=torch.float64)
    for part in layer.fixed:
        total += cosines(split(part, released), split(part, base))
    for pair in layer.pairs:
        X, Y = split(pair.left, released), split(pair.right, released)
        X0, Y0 = split(pair.left, base), split(pair.right, base)
        lengths = [(A @ A.mT * (B @ B.mT)).sum((1, 2)).sqrt() for A, B in ((X, Y), (X0, Y0))]
        inner = (_products(X, X0) * _products(Y, Y0)).sum((1, 3))
        total += inner / (lengths[0].unsqueeze(1) * lengths[1]).clamp_min(1e-30)
    return total


def _products(one: Tensor, other: Tensor) -> Tensor:
    """Inner product of every row of every block with every other, (N, h, N, h)."""
    flat = one.flatten(0, 1) @ other.flatten(0, 1).T
    return flat.reshape(*one.shape[:2], *other.shape[:2])
