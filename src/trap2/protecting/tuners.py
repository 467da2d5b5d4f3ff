"""The adapter of a model in training: peft's layers, their settings, and what each parameter is.

Layers are told by their methods: a model without an adapter need not import peft.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Literal

from torch import nn

from trap2.adapters import PEFT_PREFIX, adapter_type, moves_base
from trap2.naming import is_head

LORA_A = ("lora_A", "lora_embedding_A")
LORA_B = ("lora_B", "lora_embedding_B")
TOKENS = "trainable_tokens_delta"
"""Rows of an embedding that are trained as they are."""

Role = Literal["factor", "adapter", "tokens", "saved", "bias", "head", "stray"]
"""A LoRA adapter's second factor; another part of an adapter; trained rows; a whole module saved
beside it; a bias of the base that is; the task's head; or what no release would hold."""


class Adapter:
    """The adapter in force in a model; false where there is none.

    Attributes:
        layers: peft's layers, the outermost where one wraps another, in module order.
        settings: Configurations of the adapters in force, as dictionaries.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers: list[Any] = []
        inside: set[int] = set()
        for module in model.modules():
            if _is_tuner(module) and id(module) not in inside:
                self.layers.append(module)
                inside.update(id(part) for part in module.modules())
        base = {id(p) for layer in self.layers for p in layer.get_base_layer().parameters()}
        self._own = {id(p) for layer in self.layers for p in layer.parameters()} - base
        found = {
            id(config): config.to_dict()
            for module in model.modules()
            for name, config in (getattr(module, "peft_config", None) or {}).items()
            if name in self.names or not self.names
        }
        self.settings: list[dict[str, Any]] = list(found.values())
        self._named = any(
            part in name.split(".") for name, _ in model.named_parameters() for part in LORA_B
        )

    def __bool__(self) -> bool:
        return bool(self.layers or self.settings or self._named)

    @property
    def names(self) -> list[str]:
        """Names of the adapters in force in any layer."""
        return list(dict.fromkeys(name for layer in self.layers for name in layer.active_adapters))

    @property
    def is_linear(self) -> bool:
        """Whether the update is linear in LoRA's second factors and the tensors beside them."""
        return not self.moved_base and not any(
            adapter_type(config) not in ("LORA", "TRAINABLE_TOKENS") or config.get("use_dora")
            for config in self.settings
        )

    @property
    def moved_base(self) -> bool:
        """Whether its initialisation took something out of the base."""
        return any(moves_base(config) for config in self.settings)

    def is_active(self, name: str) -> bool:
        """Whether a parameter called so, of one adapter among several, is in force."""
        return not self.names or any(part in self.names for part in name.split("."))

    def role(self, name: str, parameter: nn.Parameter) -> Role:
        """What a trained parameter is to the adapter."""
        parts = name.split(".")
        roles: Iterable[tuple[bool, Role]] = (
            (TOKENS in parts, "tokens"),
            (any(part in parts for part in LORA_B), "factor"),
            (any(part in parts for part in LORA_A) or id(parameter) in self._own, "adapter"),
            (is_head(inner_name(name)), "head"),
            ("modules_to_save" in parts, "saved"),
            (parts[-1] == "bias" and self._saves(parts), "bias"),
        )
        return next((role for holds, role in roles if holds), "stray")

    def replaced(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Names of the modules in whose place the adapter's stand, each with the base's own."""
        ours = {id(layer) for layer in self.layers}
        for name, module in model.named_modules():
            parts = dict(module.named_children())
            if id(module) in ours and not hasattr(module, TOKENS):
                yield name, module.get_base_layer()
            elif "modules_to_save" in parts and "original_module" in parts:
                yield name, parts["original_module"]

    def _saves(self, parts: list[str]) -> bool:
        """Whether peft writes a bias of the base into the adapter's file."""
        trained = {config.get("bias", "none") for config in self.settings}
        return "all" in trained or (trained != {"none"} and parts[-2] == "base_layer")


def inner_name(name: str) -> str:
    """A parameter's name inside the model an adapter wraps."""
    return name.split(PEFT_PREFIX, 1)[-1]


def base_name(name: str) -> str | None:
    """What the base calls a parameter that holds its weight; None for those of an adapter."""
    parts = inner_name(name).split(".")
    if any(part in (*LORA_A, *LORA_B, TOKENS, "original_module") for part in parts):
        return None
    if "modules_to_save" in parts:  # the copy in force
        at = parts.index("modules_to_save")
        parts = parts[:at] + parts[at + 2 :]
    return ".".join(part for part in parts if part != "base_layer")


def _is_tuner(module: nn.Module) -> bool:
    return hasattr(type(module), "get_base_layer") and hasattr(type(module), "adapter_layer_names")
