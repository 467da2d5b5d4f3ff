"""A merge as a checkpoint of its own: the base's tensors plus the merged update, for transformers.

Heads are never merged: the release's own head goes along, and the tensors have the release's
names, so that the checkpoint is of the release's class. Configuration and tokenizer are the base's,
with the release's classes.
"""

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from trap2.errors import UserError
from trap2.files import nested, read_json, write_json
from trap2.naming import is_head
from trap2.update import Update

SHARD = 10**9
"""Largest weight file in bytes; no more of the model than that is ever in memory."""

BESIDE = (
    *("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "spiece", "sentencepiece"),
    *("preprocessor_config", "processor_config", "chat_template", "generation_config"),
)
"""How the files begin that a checkpoint needs beside its weights and its configuration."""

OF_A_HEAD = ("architectures", "id2label", "label2id", "num_labels", "problem_type")
"""Keys of a configuration that belong to the head."""


def write_model(folder: Path, release: Update, merged: Iterable[tuple[str, Tensor]]) -> None:
    """Fill a folder with the merged model.

    Args:
        folder: Where; it exists and is empty.
        release: Whose head and names it has.
        merged: (base tensor name, merged update) pairs, as `merge` yields them.

    Raises:
        UserError: The base has no configuration, or the release does not say how many classes its
            head has.
    """
    write_json(folder / "config.json", _config(release))
    for path in sorted(release.base.folder.iterdir()):
        if path.name.startswith(BESIDE) and path.is_file():
            shutil.copyfile(path, folder / path.name)
    _save(folder, _tensors(release, merged))


def _tensors(release: Update, merged: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the merged model by the release's name for it, in the base's type."""
    base, done = release.base, dict[str, None]()
    for name, delta in merged:
        before = base.tensor(name)
        done[name] = None
        wide = before.to(torch.promote_types(before.dtype, torch.float32))
        yield release.prefix + name, (wide + delta.to(wide)).to(before.dtype)
    for name in base.names:
        if name not in done and not (release.head and is_head(name)):
            yield release.prefix + name, base.tensor(name)
    yield from release.head.items()


def _save(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write safetensors in pieces, under the names transformers expects."""
    pieces: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        save_file(held, folder / f"{len(pieces)}.part", metadata={"format": "pt"})
        pieces.append([*held])
        held.clear()

    for name, tensor in tensors:
        if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > SHARD:
            flush()
        held[name] = tensor.contiguous()
        total += tensor.nbytes
    flush()
    if len(pieces) == 1:
        (folder / "0.part").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for place, names in enumerate(pieces):
        file = f"model-{place + 1:05d}-of-{len(pieces):05d}.safetensors"
        (folder / f"{place}.part").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def _config(release: Update) -> dict[str, Any]:
    config = read_json(release.base.folder / "config.json")
    own = release.folder / "config.json"
    if own.is_file():
        known = read_json(own)
        return config | {key: known[key] for key in OF_A_HEAD if key in known}
    if not release.head:
        return config
    adapter = read_json(release.folder / "adapter_config.json")
    architecture = nested(adapter, "auto_mapping", "base_model_class")
    labels = dict(enumerate(_classes(release)))
    return config | {
        "architectures": [architecture] if architecture else None,
        "id2label": {str(index): label for index, label in labels.items()},
        "label2id": {label: index for index, label in labels.items()},
    }


def _classes(release: Update) -> list[str]:
    """The class names of an adapter's head, made up where only their number is known."""
    record = release.folder / "trap2.json"
    named = nested(read_json(record), "recipe", "task", "classes") if record.is_file() else None
    if isinstance(named, list):
        return [str(label) for label in named]
    layers = [tensor for tensor in release.head.values() if tensor.ndim == 2]
    if len(layers) != 1:
        raise UserError(
            f"{release.folder} has a head of {len(layers)} layers and no config.json, so its "
            "number of classes is unknown; copy the classifier's config.json beside the adapter"
        )
    return [f"LABEL_{index}" for index in range(len(layers[0]))]
