"""What a release changes: the update dW = W_released - W_base, tensor by tensor.

Symbols: W0 base tensor; dW update (for LoRA `scaling * B @ A`, scaling = alpha/r, or alpha/sqrt(r)
for rsLoRA; for other adapters what `adapters.py` finds); s scale. A merge puts the update at some
scale: `W0 + s * dW`.

An update is opened from a PEFT adapter folder or a full checkpoint folder, together with its base.
It knows which tensors are shared with the base (mergeable) and which are the task's own head.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from trap2.adapters import PEFT_PREFIX, MergedDeltas, adapter_refusals, is_plain_lora
from trap2.checkpoint import Checkpoint, shapes_differ
from trap2.errors import Unsupported, UserError
from trap2.files import read_json
from trap2.naming import align, is_head


@dataclass(frozen=True)
class Factors:
    """The two factors of a LoRA update, `scaling * B @ A`, as peft stores them.

    Attributes:
        A: r first.
        B: r second.
        scaling: alpha/r, or alpha/sqrt(r) for rsLoRA.
        suffixes: What peft writes behind the module's name for A and for B.
        transposed: Whether the layer keeps its weight input first (`fan_in_fan_out`).
    """

    A: Tensor
    B: Tensor
    scaling: float
    suffixes: tuple[str, str]
    transposed: bool = False

    def delta(self) -> Tensor | None:
        """The update in the base's shape; None where the shapes are of no known layer."""
        a, b = self.A, self.B
        if self.suffixes[0] == "lora_embedding_A":
            return self.scaling * (b @ a).T
        if a.dim() == 2:
            product = self.scaling * (b @ a)
            return product.T if self.transposed else product
        if a.dim() == 4 and tuple(b.shape[1:]) == (a.shape[0], 1, 1):
            return self.scaling * torch.einsum("or,rikl->oikl", b[:, :, 0, 0], a)
        return None


class Deltas(Protocol):
    """Source of one release's update tensors, by base tensor name."""

    shared: tuple[str, ...]
    head: dict[str, Tensor]

    def delta(self, name: str) -> Tensor:
        """The float32 update of one base tensor."""

    def own_name(self, name: str) -> str:
        """What the release calls a base tensor that it changes."""

    def factors(self, name: str) -> Factors | None:
        """The factors of its update; None where it is kept whole."""


class Update:
    """What a release changes in its base.

    Attributes:
        kind: "lora", "adapter" (any other adapter than LoRA or rsLoRA alone) or "full".
        shared: Names of the base tensors it may change, in a fixed order; these are merged.
        head: Tensors of its own task head; these are never merged.
        base: The base checkpoint.
        folder: The release folder.
    """

    kind: Literal["lora", "adapter", "full"]

    def __init__(self, folder: Path, base: Checkpoint) -> None:
        self.folder, self.base = folder, base
        source: Deltas
        if not (folder / "adapter_config.json").is_file():
            self.kind, self.weights = "full", Checkpoint(folder)
            source = _CheckpointDeltas(self.weights, base)
        else:
            config = _checked_config(folder)
            self.weights = Checkpoint(folder, "adapter_model")
            if is_plain_lora(config):
                self.kind, source = "lora", _LoraDeltas(self.weights, base, config)
            else:
                self.kind, source = "adapter", MergedDeltas(self.weights, base, config)
        self._source = source
        self.shared: tuple[str, ...] = source.shared
        self.head: dict[str, Tensor] = source.head

    @classmethod
    def open(cls, release: Path | str, base: Path | str) -> "Update":
        """Open a release against its base.

        Args:
            release: A PEFT adapter folder (`adapter_config.json`) or a full checkpoint folder.
            base: Folder of the base checkpoint.

        Raises:
            UserError: Missing or broken files, another base, or a release equal to its base.
            Unsupported: An adapter format whose update cannot be formed exactly yet.
        """
        folder = Path(release)
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder; give a folder of released weights")
        checkpoint = Checkpoint(base)
        _check_recorded_base(folder, checkpoint)
        update = cls(folder, checkpoint)
        if not any(bool(delta.any()) for _, delta in update):
            raise UserError(
                f"{folder} equals its base {checkpoint.folder}: every update is zero; "
                "give a fine-tuned release"
            )
        return update

    @property
    def digest(self) -> str:
        """SHA-256 over the released weight files."""
        return self.weights.digest

    @cached_property
    def parameters(self) -> int:
        """Number of base weights the release may change."""
        return sum(math.prod(self.base.shape(name)) for name in self.shared)

    def delta(self, name: str) -> Tensor:
        """The update dW of one base tensor, float32, in the base's shape."""
        return self._source.delta(name)

    @property
    def prefix(self) -> str:
        """What the release writes before the base's tensor names, such as `bert.`, or nothing."""
        known = self.shared[0]
        own = self._source.own_name(known)
        return own.removesuffix(known) if own.endswith(known) else ""

    def factors(self, name: str) -> Factors | None:
        """The LoRA factors of the update of one base tensor; None where it is kept whole."""
        return self._source.factors(name)

    def scaled(self, name: str, s: float) -> Tensor:
        """W0 + s * dW of one base tensor, float32."""
        return self.base.tensor(name).float() + s * self.delta(name)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """All (base tensor name, dW), read one at a time."""
        for name in self.shared:
            yield name, self.delta(name)


def _check_recorded_base(folder: Path, base: Checkpoint) -> None:
    """Compare the base with what the release says of it: its digest if recorded, else its name."""
    record = folder / "trap2.json"
    if record.is_file():
        expected = read_json(record).get("digests", {}).get("base")
        if expected and expected != base.digest:
            raise UserError(
                f"{folder} was trained on a base with digest {expected}, but {base.folder} has "
                f"{base.digest}; give the base it was trained on"
            )
        return
    config = folder / "adapter_config.json"
    named = read_json(config).get("base_model_name_or_path") if config.is_file() else None
    own = _own_name(base.folder)
    if named and Path(named).name.lower() not in own:
        raise UserError(
            f"{folder} names '{named}' as its base, but {base.folder} is {' or '.join(own)}; give "
            "that base, or correct base_model_name_or_path in adapter_config.json if it is the same"
        )


def _own_name(folder: Path) -> tuple[str, ...]:
    """The names a base goes by: its folder's, its Hub cache's and its config's, last parts."""
    config = folder / "config.json"
    recorded = read_json(config).get("_name_or_path", "") if config.is_file() else ""
    cached = [p.name.split("--")[-1] for p in folder.parents if p.name.startswith("models--")]
    names = (folder.resolve().name, *cached, Path(str(recorded)).name)
    return tuple(dict.fromkeys(name.lower() for name in names if name))


class _CheckpointDeltas:
    """Update of a full checkpoint: released tensor minus base tensor."""

    def __init__(self, weights: Checkpoint, base: Checkpoint) -> None:
        self._weights, self._base = weights, base
        mapped = align(weights.names, base.names)
        shared = {
            known: name
            for name, known in mapped.items()
            if not is_head(name) and base.tensor(known).is_floating_point()
        }
        if not shared:
            raise UserError(
                f"{weights.folder} shares no tensor with the base {base.folder}; "
                "give the base it was trained on"
            )
        for known, name in shared.items():
            if weights.shape(name) != base.shape(known):
                raise UserError(shapes_differ(weights, name, weights.shape(name), base, known))
        self.shared = tuple(name for name in base.names if name in shared)
        self.head = {name: weights.tensor(name) for name in weights.names if name not in mapped} | {
            name: weights.tensor(name) for name in mapped if is_head(name)
        }
        foreign = [name for name in self.head if not is_head(name)]
        if len(foreign) > len(shared):
            raise UserError(
                f"{weights.folder} is another architecture than {base.folder}: "
                f"{len(foreign)} of its tensors are unknown there, such as '{foreign[0]}'; "
                "give releases of one base"
            )
        self._refuse_another_depth(shared)
        self._names = shared

    def _refuse_another_depth(self, shared: dict[str, str]) -> None:
        """A stack of layers that is only partly shared belongs to a deeper or shallower model."""
        for ours, known, folder in (
            ({*shared}, self._base.names, self._base.folder),
            ({*shared.values()}, self._weights.names, self._weights.folder),
        ):
            stacks = {_unnumbered(name) for name in ours}
            alone = [n for n in known if n not in ours and _unnumbered(n) in stacks]
            if alone:
                raise UserError(
                    f"{self._weights.folder} has another depth than {self._base.folder}: only "
                    f"{folder} has '{alone[0]}'; give releases of one base"
                )

    def delta(self, name: str) -> Tensor:
        return self._weights.tensor(self._names[name]).float() - self._base.tensor(name).float()

    def own_name(self, name: str) -> str:
        return self._names[name]

    def factors(self, name: str) -> Factors | None:
        return None


class _LoraDeltas:
    """Update of a LoRA or rsLoRA adapter: scaling * B @ A, plus whole tensors saved beside it."""

    def __init__(self, weights: Checkpoint, base: Checkpoint, config: Mapping[str, Any]) -> None:
        self._weights, self._base, self._config = weights, base, config
        names = [name.removeprefix(PEFT_PREFIX) for name in weights.names]
        modules = dict.fromkeys(n.rsplit(".lora_", 1)[0] for n in names if ".lora_" in n)
        targets = [f"{module}.weight" for module in modules]
        saved = [name for name in names if ".lora_" not in name]
        mapped = align(targets + [n for n in saved if not is_head(n)], base.names)
        unknown = [name for name in targets if name not in mapped]
        if unknown:
            raise UserError(
                f"{weights.folder} adapts '{unknown[0]}', which the base {base.folder} does not "
                f"have ({len(unknown)} of {len(targets)} targets); give the base it was trained on"
            )
        self._modules = {mapped[f"{module}.weight"]: module for module in modules}
        self._saved = {mapped[name]: name for name in saved if name in mapped}
        ours = {**self._modules, **self._saved}
        self.shared = tuple(name for name in base.names if name in ours)
        self.head = {
            name: weights.tensor(PEFT_PREFIX + name) for name in saved if name not in mapped
        }
        for name in self.shared:
            self.delta(name)

    def delta(self, name: str) -> Tensor:
        if name in self._saved:
            new = self._weights.tensor(PEFT_PREFIX + self._saved[name]).float()
            delta = new - self._base.tensor(name).float() if self._fits(name, new) else new
        else:
            delta = self._low_rank(name)
        if not self._fits(name, delta):
            raise UserError(
                shapes_differ(self._weights, name, tuple(delta.shape), self._base, name)
            )
        return delta

    def _fits(self, name: str, delta: Tensor) -> bool:
        return tuple(delta.shape) == self._base.shape(name)

    def own_name(self, name: str) -> str:
        return self._saved[name] if name in self._saved else f"{self._modules[name]}.weight"

    def factors(self, name: str) -> Factors | None:
        if name in self._saved:
            return None
        module = self._modules[name]
        suffixes = ("lora_embedding_A", "lora_embedding_B")
        if f"{PEFT_PREFIX}{module}.{suffixes[0]}" not in self._weights:
            suffixes = ("lora_A.weight", "lora_B.weight")
        a, b = (self._weights.tensor(f"{PEFT_PREFIX}{module}.{s}").float() for s in suffixes)
        transposed = bool(self._config.get("fan_in_fan_out"))
        return Factors(a, b, self._scaling(module, a.shape[0]), suffixes, transposed)

    def _low_rank(self, name: str) -> Tensor:
        found = self.factors(name)
        assert found is not None
        delta = found.delta()
        if delta is not None:
            return delta
        raise Unsupported(
            f"{self._weights.folder} adapts '{self._modules[name]}' with factors of shape "
            f"{tuple(found.A.shape)} and {tuple(found.B.shape)}; only linear, embedding "
            "and ungrouped 2-D convolution layers are exact yet"
        )

    def _scaling(self, module: str, rank: int) -> float:
        alpha = self._config["lora_alpha"]
        for pattern, own in (self._config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = own
                break
        return float(alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank))


def _checked_config(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json and refuse what cannot be formed exactly."""
    config = read_json(folder / "adapter_config.json")
    reasons = adapter_refusals(config)
    if reasons:
        raise Unsupported(
            f"{folder} uses {'; '.join(reasons)}: not exact yet; merge it into a full checkpoint "
            "with peft's merge_and_unload and give that"
        )
    if is_plain_lora(config) and not isinstance(config.get("lora_alpha"), (int, float)):
        raise UserError(f"{folder}/adapter_config.json has no lora_alpha; download it again")
    return config


def _unnumbered(name: str) -> str:
    return ".".join("#" if part.isdigit() else part for part in name.split("."))
