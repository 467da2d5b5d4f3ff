"""Bring a release back into its base's basis before it is merged.

A release can be hidden from merging by changes that leave its function alone: hidden units and
heads that change places, queries and keys or values and outputs in another basis, GLU rows scaled
(PaRaMS, MergeLock, MergeBarrier). With the base at hand they can be undone, without data and
without knowing what was done. What comes back is an update like any other, for every merge.

Only layers are searched; the residual stream is taken to be in its place.
"""

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

from trap2.attacks.anatomy import Layer, Part, Read, Rewrite, anatomy
from trap2.attacks.basis import change_of_basis, fitted
from trap2.attacks.matching import assigned, cosines, order
from trap2.attacks.vectors import TaskVector
from trap2.registry import Registry
from trap2.update import Update

Undo: TypeAlias = Callable[[Layer, Read, Read], dict[str, Rewrite]]
"""From a layer, the release's tensors and the base's to how the release's shall read."""

UNDOS: Registry[Undo] = Registry("undo")
"""All ways to undo a hidden basis, by name."""

RIDGE = 1e-8
"""As published, of the independent solve."""


def undone(update: Update, method: str) -> TaskVector:
    """The update of a release that was brought back into its base's basis.

    Args:
        update: The release as it was published.
        method: A name in `UNDOS`.

    Returns:
        Its task vector; tensors in which nothing was hidden are those of the release, bit by bit.

    Raises:
        UserError: The method is unknown, or the architecture is.
    """
    changed = dict.fromkeys(update.shared)

    def base(name: str) -> Tensor:
        return update.base.tensor(name).double()

    def released(name: str) -> Tensor:
        return base(name) + update.delta(name) if name in changed else base(name)

    solve, rewrites = UNDOS.get(method), dict[str, Rewrite]()
    for layer in anatomy(update.base):
        rewrites |= solve(layer, released, base)

    def delta(name: str) -> Tensor:
        if name not in rewrites:
            return update.delta(name)
        return rewrites[name](released(name)) - base(name)

    names = [name for name in update.base.names if name in changed or name in rewrites]
    return TaskVector(names, delta)


def nearest(layer: Layer, released: Read, base: Read) -> dict[str, Rewrite]:
    """Of all weights with the release's function those nearest to the base; it stays exact.

    Blocks are matched with the base's (`matching`), then every pair takes the smallest kind of
    change of basis that comes near (`basis`): none, a scale, a rotation or any invertible matrix,
    the last of which is the coupled Anchor-Guided solve; with RoPE one that commutes with it.

    Args:
        layer: Where to look.
        released: Reads the release's tensors.
        base: Reads the base's.
    """
    blocks = order(layer, released, base)
    places = {layer.blocks: blocks}
    if blocks is not None:  # parts with one block a group follow their group
        size = layer.blocks // layer.groups
        places[layer.groups] = blocks[::size] // size

    def split(part: Part, read: Read) -> Tensor:
        found = part.split(read)
        place = places.get(part.blocks) if read is released else None
        found = found if place is None else found[place]
        grouped = found.reshape(layer.groups, -1, *found.shape[1:])
        return grouped.transpose(1, 2).flatten(2)

    rewrites: dict[str, Rewrite] = {}
    for part in layer.fixed:
        rewrites |= part.rewrites(places.get(part.blocks), None)
    for pair in layer.pairs:
        both = [split(part, read) for read in (released, base) for part in (pair.left, pair.right)]
        matrices = change_of_basis(pair.kinds, *both) or (None, None)
        for part, matrix in zip((pair.left, pair.right), matrices, strict=True):
            rewrites |= part.rewrites(places.get(part.blocks), matrix)
    return rewrites


def anchor_guided(layer: Layer, released: Read, base: Read) -> dict[str, Rewrite]:
    """The Anchor-Guided Attack as published: every part by itself; the function changes a little.

    Attention: T = argmin |T X - X0|^2 of the weights of every head of Q, K, V and O alone. MLP:
    units by the cosine of their rows in the first layer, or in the gate.

    Args:
        layer: Where to look.
        released: Reads the release's tensors.
        base: Reads the base's.
    """
    rewrites: dict[str, Rewrite] = {}
    if not layer.fixed:
        for part in layer.parts:
            parts = [part.split(read, bias=False) for read in (released, base)]
            rewrites |= part.rewrites(None, fitted(RIDGE, *parts))
        return rewrites
    first = layer.fixed[0]
    units = assigned(cosines(*(first.split(read, bias=False) for read in (released, base))))
    for part in layer.parts:
        rewrites |= part.rewrites(units, None)
    return rewrites


UNDOS.add("nearest", nearest)
UNDOS.add("anchor_guided", anchor_guided)
