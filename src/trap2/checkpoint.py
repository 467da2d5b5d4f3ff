"""A folder of safetensors weights, read tensor by tensor; nothing else is opened as weights."""

from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from trap2.errors import UserError
from trap2.files import read_json, weights_digest

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


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

    def _locate(self, stem: str) -> dict[str, Path]:
        index = self.folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            weight_map: dict[str, str] = read_json(index).get("weight_map", {})
            return {name: self._inside(file) for name, file in sorted(weight_map.items())}
        single = self.folder / f"{stem}.safetensors"
        if not single.is_file():
            raise UserError(self._why_none(stem))
        with self._open(single) as tensors:
            return dict.fromkeys(sorted(tensors.keys()), single)

    def _inside(self, file: str) -> Path:
        path = self.folder / file
        if Path(file).name != file or not path.is_file():
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

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return tuple(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it."""
        with self._open(self._files[name]) as tensors:
            return tuple(tensors.get_slice(name).get_shape())

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor as it is stored.

        Raises:
            UserError: A floating-point tensor holds NaN or infinity.
        """
        with self._open(self._files[name]) as tensors:
            value: torch.Tensor = tensors.get_tensor(name)
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise UserError(
                f"tensor '{name}' in {self.folder} holds NaN or infinity; "
                "the weights are broken, train or download them again"
            )
        return value

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the weight files of the folder."""
        return weights_digest(self.folder)
