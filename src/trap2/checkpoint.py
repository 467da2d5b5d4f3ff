"""A folder of safetensors weights, read tensor by tensor; nothing else is opened as weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from trap2.errors import UserError
from trap2.files import read_json, weights_digest
from trap2.finite import all_finite

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

HELD = 2**26
"""Bytes read of a file until it is opened anew. An open file is mapped, and what was read of the
map counts as memory; but to open one for every tensor takes longer than to read most tensors."""


class Checkpoint:
    """Lazy view of the tensors of one folder (`model.safetensors`, shards, or an adapter file).

    Args:
        folder: The folder.
        stem: File stem to look for: "model" or "adapter_model".

    Raises:
        UserError: Missing folder, no safetensors weights, pickle weights, or a damaged file.
    """

    def __init__(self, folder: Path | str, stem: str = "model") -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"{self.folder} is not a folder; give a folder of released weights")
        self._files = self._locate(stem)
        self._finite: set[str] = set()
        self._held: tuple[tuple[object, ...], safe_open] | None = None
        self._read = 0

    def _locate(self, stem: str) -> dict[str, Path]:
        single = self.folder / f"{stem}.safetensors"
        if single.is_file():  # a stale index beside it is ignored, as transformers does
            with self._open(single) as tensors:
                return dict.fromkeys(sorted(tensors.keys()), single)
        index = self.folder / f"{stem}.safetensors.index.json"
        if not index.is_file():
            raise UserError(self._why_none(stem))
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index} lists no weights; download it again")
        return {name: self._inside(file) for name, file in sorted(weight_map.items())}

    def _inside(self, file: object) -> Path:
        path = self.folder / str(file)
        if Path(str(file)).name != file or not path.is_file():
            raise UserError(
                f"{self.folder} lists a weight file '{file}' that is not there; download it again"
            )
        return path

    def _why_none(self, stem: str) -> str:
        pickles = sorted(p.name for pattern in PICKLES for p in self.folder.glob(pattern))
        if pickles:
            return (
                f"{self.folder / pickles[0]} is a pickle, which can run code when opened, and is "
                "refused; if you trust its author, load it with transformers and save it again "
                "with save_pretrained(..., safe_serialization=True)"
            )
        return f"{self.folder} holds no {stem}.safetensors; give a folder of released weights"

    @staticmethod
    def _open(path: Path) -> safe_open:
        try:
            return safe_open(str(path), framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"cannot read {path}: {error}; download it again") from error

    def _opened(self, path: Path) -> safe_open:
        """The open file; anew where another was read last, where it changed, or past `HELD`."""
        key = _stamp(path)
        if self._held is None or self._held[0] != key or self._read > HELD:
            self._held, self._read = (key, self._open(path)), 0
        return self._held[1]

    @contextmanager
    def _holding(self, name: str) -> Iterator[Any]:
        """The open file that holds a tensor."""
        if name not in self._files:
            raise UserError(f"{self.folder} lacks tensor '{name}'; download it again")
        path = self._files[name]
        try:
            yield self._opened(path)
        except SafetensorError as error:
            raise UserError(
                f"cannot read '{name}' in {path}: {error}; download it again"
            ) from error

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return tuple(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it."""
        with self._holding(name) as tensors:
            return tuple(tensors.get_slice(name).get_shape())

    def stamp(self, name: str) -> tuple[object, ...]:
        """What tells the file that holds a tensor from another, or from itself once it changed."""
        return _stamp(self._files[name])

    def tensor(self, name: str, mapped: bool = False) -> torch.Tensor:
        """Read one tensor as it is stored; its entries are looked at the first time.

        Args:
            name: Its name.
            mapped: Give the file's own memory, to be read at once and not to be changed.

        Raises:
            UserError: It is not there, or a floating-point tensor holds NaN or infinity.
        """
        with self._holding(name) as tensors:
            value: torch.Tensor = tensors.get_tensor(name)
            value = value if mapped else value.clone()
        self._read += value.nbytes
        if name in self._finite:
            return value
        if value.is_floating_point() and not all_finite(value):
            raise UserError(
                f"tensor '{name}' in {self.folder} holds NaN or infinity; "
                "the weights are broken, train or download them again"
            )
        self._finite.add(name)
        return value

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the weight files of the folder."""
        return weights_digest(self.folder)


def _stamp(path: Path) -> tuple[object, ...]:
    try:
        state = path.stat()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}; download it again") from error
    return path, state.st_ino, state.st_size, state.st_mtime_ns


def shapes_differ(
    weights: Checkpoint, name: str, shape: tuple[int, ...], base: Checkpoint, known: str
) -> str:
    """What to say where a released tensor does not fit the base's."""
    return (
        f"'{name}' in {weights.folder} has shape {shape}, but {base.shape(known)} in the base "
        f"{base.folder}; give the base it was trained on"
    )
