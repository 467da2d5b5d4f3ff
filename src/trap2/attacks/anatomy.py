"""Where a transformer can hide: the blocks of its layers whose basis no user can see.

Attention heads and hidden units are blocks. Whoever changes the places of the blocks of a layer, or
the basis in which two tensors meet inside a block, changes the weights and not the function:

    attention   Q_h' K_h = (M Q_h)' (M^-T K_h)     O_h V_h = (O_h N^-1) (N V_h)
    MLP         out_j act(in_j x)                  units change places, nothing more
    GLU         down_j up_j = (down_j / a) (a up_j)    the gate only changes places

M, N are any invertible matrices; where queries and keys are rotated by position (RoPE) M must
commute with that. A group of query heads that share keys and values is one block.

Layers are found by the model type of the base's configuration and the names of its tensors.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from trap2.checkpoint import Checkpoint
from trap2.errors import UserError
from trap2.files import nested, read_json

Read: TypeAlias = Callable[[str], Tensor]
"""From a tensor's name to the tensor."""

Rewrite: TypeAlias = Callable[[Tensor], Tensor]
"""From a tensor to the same tensor in another basis."""

FREE = ("scale", "rotation", "invertible")
"""Kinds of change that an ordinary pair allows (`basis.KINDS`), the smallest first."""

BERT = (
    *("attention.self.query", "attention.self.key", "attention.self.value"),
    *("attention.output.dense", "intermediate.dense", "output.dense"),
)
VIT = tuple(name.replace("self", "attention") for name in BERT)
LLAMA = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.up_proj", "mlp.down_proj", "mlp.gate_proj"),
)

LAYOUTS = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta"), BERT),
    "vit": VIT,
    **dict.fromkeys(("llama", "mistral", "qwen2"), LLAMA),
}
"""By model type, what the modules of a layer are called: query, key, value, output of attention,
input and output of the MLP, and its gate if it has one. Those with a gate have RoPE."""


@dataclass(frozen=True)
class Part:
    """A linear layer whose outputs (rows) or inputs (columns) belong to blocks.

    Attributes:
        weight: Name of its weight.
        bias: Name of the bias that belongs to the rows; None if there is none.
        columns: Whether its columns belong to blocks.
        blocks: How many heads or units it has.
    """

    weight: str
    bias: str | None
    columns: bool
    blocks: int

    def split(self, read: Read, bias: bool = True) -> Tensor:
        """Its rows (or columns) by block, float64 (blocks, width, entries), bias included."""
        rows = read(self.weight).double()
        rows = rows.T if self.columns else rows
        if bias and self.bias is not None:
            rows = torch.cat([rows, read(self.bias).double().unsqueeze(1)], 1)
        return rows.reshape(self.blocks, -1, rows.shape[1])

    def rewrites(self, order: Tensor | None, matrices: Tensor | None) -> dict[str, Rewrite]:
        """How its tensors read once its blocks have changed.

        Args:
            order: (blocks,) the block that takes each place; None leaves them there.
            matrices: (groups, width, width) by which the rows of each group of blocks are
                multiplied; None leaves them.
        """
        if order is None and matrices is None:
            return {}

        def rewrite(tensor: Tensor) -> Tensor:
            rows = tensor.T if self.columns else tensor.reshape(len(tensor), -1)
            blocks = rows.reshape(self.blocks, -1, rows.shape[1])
            blocks = blocks if order is None else blocks[order]
            if matrices is not None:
                blocks = matrices.repeat_interleave(self.blocks // len(matrices), 0) @ blocks
            found = blocks.reshape(rows.shape)
            return found.T if self.columns else found.reshape(tensor.shape)

        return {name: rewrite for name in (self.weight, self.bias) if name is not None}


@dataclass(frozen=True)
class Pair:
    """Two parts that meet inside every block: M on one is undone by M^-T on the other.

    Attributes:
        left: Takes M.
        right: Takes M^-T.
        kinds: The kinds of M that leave the function alone, the smallest first.
    """

    left: Part
    right: Part
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class Layer:
    """The blocks of one attention or MLP.

    Attributes:
        pairs: What may change its basis.
        fixed: What only changes places with its blocks.
        groups: How many groups of blocks share the parts that have fewer.
    """

    pairs: tuple[Pair, ...]
    fixed: tuple[Part, ...]
    groups: int

    @property
    def parts(self) -> tuple[Part, ...]:
        """All of its tensors."""
        return (*(part for pair in self.pairs for part in (pair.left, pair.right)), *self.fixed)

    @property
    def blocks(self) -> int:
        """How many blocks can change places."""
        return max(part.blocks for part in self.parts)


def anatomy(base: Checkpoint) -> list[Layer]:
    """All attention and MLP layers of a base.

    Args:
        base: The base; its folder holds its configuration.

    Raises:
        UserError: It is no architecture of which this is known.
    """
    path = base.folder / "config.json"
    config = read_json(path) if path.is_file() else {}
    kind = str(config.get("model_type"))
    layout = LAYOUTS.get(kind)
    if layout is None:
        raise UserError(
            f"{base.folder} is of model type '{kind}', in which it is not known where weights "
            f"can hide; known: {', '.join(LAYOUTS)}; leave undo out"
        )
    unusual = config.get("position_embedding_type", "absolute") != "absolute"
    unusual |= nested(config, "rope_parameters", "partial_rotary_factor") not in (None, 1.0)
    ending = f".{layout[0]}.weight"
    places = [name.removesuffix(ending) for name in base.names if name.endswith(ending)]
    if unusual or not places:
        raise UserError(
            f"{base.folder} is a '{kind}' with other layers or positions than usual, in which "
            "weights hide otherwise; leave undo out"
        )
    return [layer for place in places for layer in _layers(base, config, place, layout)]


def _layers(
    base: Checkpoint, config: dict[str, Any], place: str, layout: tuple[str, ...]
) -> Iterator[Layer]:
    """Attention and MLP of the transformer layer whose modules have this prefix."""

    def part(module: str, blocks: int, columns: bool = False) -> Part:
        weight, bias = (f"{place}.{module}.{what}" for what in ("weight", "bias"))
        size = base.shape(weight)[int(columns)]
        if blocks < 1 or size % blocks:
            raise UserError(
                f"'{weight}' in {base.folder} has {size} rows or columns, which are no {blocks} "
                "heads; correct config.json"
            )
        return Part(weight, bias if bias in base and not columns else None, columns, blocks)

    query, key, value, out, into, down, *gate = layout
    heads = int(config.get("num_attention_heads") or 0)
    groups = int(config.get("num_key_value_heads") or heads)
    turning = Pair(part(query, heads), part(key, groups), ("rotary",) if gate else FREE)
    passing = Pair(part(value, groups), part(out, heads, columns=True), FREE)
    yield Layer((turning, passing), (), groups)
    units = base.shape(f"{place}.{into}.weight")[0]
    first, last = part(into, units), part(down, units, columns=True)
    if gate:
        yield Layer((Pair(first, last, ("scale",)),), (part(gate[0], units),), units)
    else:
        yield Layer((), (first, last), units)
