"""What rival defences do to released weights, written out head by head: an oracle for undoing it.

Every change leaves the function alone: units and heads change places (PaRaMS, arXiv 2503.07661),
queries and keys, values and outputs are scaled (PaRaMS), rotated (MergeBarrier, 2511.10712) or
multiplied by any invertible matrix (MergeLock, 2509.01548), rows of a GLU are scaled.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

NAMES = {
    "bert": {
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "o": "attention.output.dense",
        "up": "intermediate.dense",
        "down": "output.dense",
    },
    "vit": {
        "q": "attention.attention.query",
        "k": "attention.attention.key",
        "v": "attention.attention.value",
        "o": "attention.output.dense",
        "up": "intermediate.dense",
        "down": "output.dense",
    },
    "llama": {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
        "gate": "mlp.gate_proj",
    },
}
RIVALS = {
    "permuted": ("units", "heads"),
    "scaled": ("units", "scale", "glu"),
    "rotated": ("rotation",),
    "mixed": ("invertible",),
    "all": ("units", "heads", "invertible", "glu"),
}


def hide(
    tensors: Mapping[str, Tensor],
    family: str,
    heads: int,
    groups: int,
    ways: Iterable[str],
    seed: int = 0,
) -> dict[str, Tensor]:
    """The same model in other weights.

    Args:
        tensors: Its tensors by their names on the disk.
        family: A key of `NAMES`.
        heads: Query heads.
        groups: Key and value heads.
        ways: Of units, heads, scale, rotation, invertible, glu.
        seed: Of everything drawn.
    """
    draw = torch.Generator().manual_seed(seed)
    found, names = dict(tensors), NAMES[family]
    ending = f".{names['q']}.weight"
    for prefix in [name.removesuffix(ending) for name in tensors if name.endswith(ending)]:
        places = {
            short + kind[0]: f"{prefix}.{long}.{kind}"
            for short, long in names.items()
            for kind in ("weight", "bias")
            if f"{prefix}.{long}.{kind}" in tensors
        }
        layer = {short: tensors[name].double() for short, name in places.items()}
        if "units" in ways:
            _permute_units(layer, draw)
        if "glu" in ways and "gatew" in layer:
            _scale_glu(layer, draw)
        for way in ("scale", "rotation", "invertible"):
            if way in ways:
                _change_bases(layer, way, heads, groups, "gatew" in layer, draw)
        if "heads" in ways:
            _permute_heads(layer, heads, groups, draw)
        found |= {name: layer[s].to(tensors[name]).contiguous() for s, name in places.items()}
    return found


def hide_folder(release: Path, out: Path, family: str, heads: int, groups: int, rival: str) -> Path:
    """A copy of a full release, hidden by one of the `RIVALS`."""
    out.mkdir(parents=True)
    for path in release.iterdir():
        if path.is_file() and path.suffix == ".json" and path.name != "trap2.json":
            (out / path.name).write_bytes(path.read_bytes())
    hidden = hide(load_file(release / "model.safetensors"), family, heads, groups, RIVALS[rival])
    save_file(hidden, out / "model.safetensors", metadata={"format": "pt"})
    return out


def _permute_units(layer: dict[str, Tensor], draw: torch.Generator) -> None:
    units = torch.randperm(len(layer["upw"]), generator=draw)
    for name in ("upw", "upb", "gatew", "gateb"):
        if name in layer:
            layer[name] = layer[name][units]
    layer["downw"] = layer["downw"][:, units]


def _scale_glu(layer: dict[str, Tensor], draw: torch.Generator) -> None:
    a = _between(len(layer["upw"]), 0.05, 20, draw)
    a *= torch.randint(0, 2, a.shape, generator=draw) * 2 - 1
    layer["upw"] = a[:, None] * layer["upw"]
    layer["downw"] = layer["downw"] / a


def _change_bases(
    layer: dict[str, Tensor], way: str, heads: int, groups: int, rope: bool, draw: torch.Generator
) -> None:
    h, size = len(layer["qw"]) // heads, heads // groups
    for group in range(groups):
        M, N = _matrix(way, h, rope, draw), _matrix(way, h, False, draw)
        dual = torch.linalg.inv(M).T
        own = slice(group * h, (group + 1) * h)
        for kind in "wb":
            if "k" + kind in layer:
                layer["k" + kind][own] = dual @ layer["k" + kind][own]
                layer["v" + kind][own] = N @ layer["v" + kind][own]
        for head in range(group * size, (group + 1) * size):
            rows = slice(head * h, (head + 1) * h)
            layer["qw"][rows] = M @ layer["qw"][rows]
            if "qb" in layer:
                layer["qb"][rows] = M @ layer["qb"][rows]
            layer["ow"][:, rows] = layer["ow"][:, rows] @ torch.linalg.inv(N)


def _permute_heads(
    layer: dict[str, Tensor], heads: int, groups: int, draw: torch.Generator
) -> None:
    h, size = len(layer["qw"]) // heads, heads // groups
    order = torch.randperm(groups, generator=draw)
    inner = [torch.randperm(size, generator=draw) + int(group) * size for group in order]

    def rows(blocks: Tensor) -> Tensor:
        return torch.cat([torch.arange(int(b) * h, (int(b) + 1) * h) for b in blocks])

    for name, blocks in (("q", torch.cat(inner)), ("k", order), ("v", order)):
        for kind in "wb":
            if name + kind in layer:
                layer[name + kind] = layer[name + kind][rows(blocks)]
    layer["ow"] = layer["ow"][:, rows(torch.cat(inner))]


def _matrix(way: str, h: int, rope: bool, draw: torch.Generator) -> Tensor:
    if rope:  # only what commutes with the rotation of the pairs (j, j + h/2)
        size = torch.ones(h // 2) if way == "rotation" else _between(h // 2, 0.05, 20, draw)
        angle = torch.rand(h // 2, generator=draw, dtype=torch.float64) * 6.28
        angle = angle * (way != "scale")
        a, b = (torch.diag(size * wave(angle)) for wave in (torch.cos, torch.sin))
        return torch.cat([torch.cat([a, -b], 1), torch.cat([b, a], 1)], 0)
    if way == "scale":
        return torch.diag(_between(h, 0.05, 20, draw))
    U, V = (
        torch.linalg.qr(torch.randn(h, h, generator=draw, dtype=torch.float64)).Q for _ in range(2)
    )
    return U if way == "rotation" else U @ torch.diag(_between(h, 0.1, 10, draw)) @ V


def _between(count: int, low: float, high: float, draw: torch.Generator) -> Tensor:
    share = torch.rand(count, generator=draw, dtype=torch.float64)
    return low * (high / low) ** share
