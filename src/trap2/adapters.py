"""Adapters other than plain LoRA: which can be merged, and what a merge of them adds to the base.

Symbols: W0 base weight; dW what merging the adapter adds to it.

No adapter's formula stands here. peft puts the adapter on layers of the names and shapes it was
made for, and merges it; dW is what came out minus what went in. The base's weights are read one
layer at a time. Nothing of a release is executed; peft is imported only where it is needed.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from trap2.checkpoint import Checkpoint, shapes_differ
from trap2.errors import Unsupported, UserError
from trap2.naming import align, is_head

PEFT_PREFIX = "base_model.model."

FROM_BASE = ("FROD", "OSF", "PSOFT")
"""Types whose frozen part is worked out from the base's weights when they are put on it."""

MERGED = (
    *("LORA", "ADALORA", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "GLORA", "GRALORA"),
    *("HIRA", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "MISS", "OFT", "PEANUT", "RANDLORA"),
    *("ROAD", "SHIRA", "SUPERTUNING", "TRAINABLE_TOKENS", "VBLORA", "VERA", "WAVEFT", *FROM_BASE),
)
"""Types (`peft_type`) that were compared with `merge_and_unload`: docs/adapters.md."""

MOVED_BASE = ("pissa", "olora")
"""Initialisations that take the first B @ A out of the base, and that the base alone determines."""

NOT_DETERMINED = ("pissa_niter", "corda", "loftq", "lora_ga")
"""Initialisations that move the base by what is not in a release: random draws or data."""

REFUSED = {
    "use_qalora": "QALoRA",
    "target_parameters": "LoRA on bare parameters",
    "layer_replication": "replicated layers",
    "megatron_config": "Megatron layouts",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "use_bdlora": "block-diagonal LoRA",
}
"""Adapter settings whose update this version cannot form exactly, with the reason."""

BESIDE_LORA = ("use_dora", "lora_bias", "trainable_token_indices")
"""Settings of a LoRA adapter whose update is more than `scaling * B @ A`."""

OF_ROWS = ("lora_embedding_A", "token_adapter", "trainable_tokens_delta")
"""What only the adapter of an embedding names its tensors."""


def adapter_type(config: Mapping[str, Any]) -> str:
    """The `peft_type` of an adapter's configuration, such as LORA."""
    return str(config.get("peft_type")).rsplit(".", 1)[-1]


def adapter_refusals(config: Mapping[str, Any]) -> list[str]:
    """Reasons why the update of an adapter cannot be formed exactly; empty when it can.

    Args:
        config: The content of an `adapter_config.json`.
    """
    kind = adapter_type(config)
    if kind not in MERGED:
        return [f"{kind}, whose merge into the base is not known to be exact"]
    reasons = [reason for key, reason in REFUSED.items() if config.get(key)]
    if kind != "LORA" and config.get("bias", "none") != "none":
        reasons.append(f"bias={config['bias']!r}, which is exact beside LoRA alone")
    if _initialisation(config).startswith(NOT_DETERMINED):
        reasons.append(
            f"init_lora_weights={config['init_lora_weights']!r}, which moves the base by what a "
            "release does not hold"
        )
    return reasons


def moves_base(config: Mapping[str, Any]) -> bool:
    """Whether the frozen base of an adapter is not the base: the first product is taken out."""
    return _initialisation(config).startswith((*MOVED_BASE, *NOT_DETERMINED))


def is_plain_lora(config: Mapping[str, Any]) -> bool:
    """Whether an adapter's update is `scaling * B @ A`, and whole tensors beside it."""
    return (
        adapter_type(config) == "LORA"
        and not any(config.get(key) for key in BESIDE_LORA)
        and config.get("bias", "none") == "none"
        and not moves_base(config)
    )


def _initialisation(config: Mapping[str, Any]) -> str:
    return str(config.get("init_lora_weights", True)).lower()


class MergedDeltas:
    """Update of an adapter of any type, merged layer by layer, and of tensors saved beside it.

    Args:
        weights: The adapter's file.
        base: The base checkpoint.
        config: The content of its `adapter_config.json`, which `adapter_refusals` has nothing
            against.

    Raises:
        UserError: The file is not that of such an adapter on this base.
        Unsupported: The installed peft does not know the type.
    """

    def __init__(self, weights: Checkpoint, base: Checkpoint, config: Mapping[str, Any]) -> None:
        self._weights, self._base = weights, base
        self._holds_base = moves_base(config) or adapter_type(config) in FROM_BASE
        self._transposed = bool(config.get("fan_in_fan_out"))
        self.head: dict[str, Tensor] = {}
        self._saved: dict[str, str] = {}  # base tensor: stored tensor that takes its place
        self._modules: dict[str, str] = {}  # adapted module of the base: its name in the release
        own = self._sorted_out(tuple(config.get("modules_to_save") or ()))
        self._layers = {known: self._layer(known, own) for known in self._modules}
        # Under the names that they have in the release.
        root = tree({name: self._layers[known] for known, name in self._modules.items()})
        try:
            self._adapted = _adapted(root, config, own)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, Unsupported):
                raise
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{weights.folder} is no sound {adapter_type(config)} adapter of {base.folder}: "
                f"{reason}; download it again, or give the base it was trained on"
            ) from error
        changed = {
            f"{known}.{part}"
            for known in self._modules
            for part, delta in self._merged(known).items()
            if part == "weight" or bool(delta.any())
        }
        self.shared = tuple(n for n in base.names if n in changed or n in self._saved)

    def _sorted_out(self, apart: tuple[str, ...]) -> dict[str, Tensor]:
        """The adapter's own tensors; heads and whole tensors of the base are noted elsewhere."""
        names = {
            stored: stored.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")
            for stored in self._weights.names
        }
        mapped = align(dict.fromkeys(_whole_or_weight(names.values())), self._base.names)
        own = {}
        for stored, name in names.items():
            module = next((m for m in _parents(name) if f"{m}.weight" in mapped), None)
            foreign = module is None and any(part in apart for part in name.split("."))
            if is_head(name) or foreign:
                self.head[name] = self._weights.tensor(stored)
            elif name in mapped:
                known, shape = mapped[name], self._weights.shape(stored)
                if shape != self._base.shape(known):
                    raise UserError(shapes_differ(self._weights, name, shape, self._base, known))
                self._saved[known] = stored
            else:
                own[stored] = self._weights.tensor(stored)
                if module is not None:
                    self._modules[mapped[f"{module}.weight"].removesuffix(".weight")] = module
        return own

    def _layer(self, known: str, own: Mapping[str, Tensor]) -> nn.Module:
        """A layer of the base; its weights take no memory where only their shape matters."""
        module = self._modules[known]
        shape = self._base.shape(f"{known}.weight")
        rows = any(f"{module}.{part}" in name for name in own for part in OF_ROWS)
        with torch.device("meta"):
            layer = layer_of(shape, rows, self._transposed)
        for part in ("weight", "bias"):
            name, value = f"{known}.{part}", None
            if name in self._base:
                read = self._read(name) if self._holds_base else None
                value = torch.zeros(()).expand(self._base.shape(name)) if read is None else read
                value = nn.Parameter(value, requires_grad=False)
            setattr(layer, part, value)
        return layer

    def _read(self, name: str) -> Tensor:
        return self._base.tensor(name).float()

    def _merged(self, known: str) -> dict[str, Tensor]:
        """What merging adds to the weight and the bias of a module of the base, float32."""
        adapted: Any = self._adapted.get_submodule(PEFT_PREFIX + self._modules[known])
        stand_in = self._layers[known]
        before = {
            part: self._read(f"{known}.{part}")
            for part in ("weight", "bias")
            if f"{known}.{part}" in self._base
        }
        filled = {}
        if not self._holds_base:
            layer = deepcopy(stand_in)
            for part, value in before.items():
                setattr(layer, part, nn.Parameter(value.clone(), requires_grad=False))
            filled = {id(stand_in): layer}
        merging = deepcopy(adapted, filled)  # the copy has the base's layer for the stand-in
        if hasattr(merging, "unload_and_optionally_merge_module"):
            layer = merging.unload_and_optionally_merge_module(True, False, None)
        else:
            merging.merge()
            layer = merging.get_base_layer()
        return {part: getattr(layer, part).detach() - value for part, value in before.items()}

    def delta(self, name: str) -> Tensor:
        """The float32 update of one base tensor."""
        if name in self._saved:
            return self._weights.tensor(self._saved[name]).float() - self._read(name)
        known, _, part = name.rpartition(".")
        return self._merged(known)[part]

    def own_name(self, name: str) -> str:
        """What the release calls a base tensor that it changes."""
        if name in self._saved:
            return self._saved[name].removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")
        known, _, part = name.rpartition(".")
        return f"{self._modules[known]}.{part}"

    def factors(self, name: str) -> None:
        """None: such an update is kept whole."""


def _parents(name: str) -> Iterator[str]:
    """`a.b` and `a` of `a.b.c`."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _whole_or_weight(names: Iterable[str]) -> Iterator[str]:
    """What a stored tensor may speak of: a whole tensor, or the weight of a module it adapts."""
    for name in names:
        yield name
        yield from (f"{module}.weight" for module in _parents(name))


def tree(layers: Mapping[str, nn.Module]) -> nn.Module:
    """A module that has these layers under their dotted names."""
    root = nn.Module()
    for name, layer in layers.items():
        *parents, last = name.split(".")
        place = root
        for part in parents:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        place.add_module(last, layer)
    return root


def layer_of(shape: tuple[int, ...], rows: bool, transposed: bool) -> nn.Module:
    """A layer whose weight has this shape.

    Args:
        shape: The weight's.
        rows: Whether it is an embedding.
        transposed: Whether a linear layer keeps its weight as (in, out).
    """
    if len(shape) == 4:
        return nn.Conv2d(shape[1], shape[0], (shape[2], shape[3]))
    if len(shape) == 1:
        return nn.LayerNorm(shape)
    if rows:
        return nn.Embedding(shape[0], shape[1])
    if transposed:
        from transformers.pytorch_utils import Conv1D

        return Conv1D(shape[1], shape[0])  # type: ignore[no-untyped-call]
    return nn.Linear(shape[1], shape[0])


def _adapted(root: nn.Module, config: Mapping[str, Any], own: dict[str, Tensor]) -> nn.Module:
    """The layers with peft's adapter on them and its tensors loaded; no random stream moves."""
    from peft import PeftConfig, PeftType, get_peft_model, set_peft_model_state_dict

    kind = adapter_type(config)
    if kind not in PeftType.__members__:
        raise Unsupported(f"the installed peft has no adapter of type {kind}; install a newer one")
    settings = {
        **config,
        "peft_type": kind,
        "modules_to_save": None,
        "task_type": None,
        "inference_mode": False,
    }
    if "bias" in settings:
        settings["bias"] = "none"  # trained biases are whole tensors
    if "init_lora_weights" in settings and not moves_base(config):
        settings["init_lora_weights"] = True
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = PeftConfig.from_peft_type(**settings)  # type: ignore[no-untyped-call]
        adapted: nn.Module = get_peft_model(root, made)
        loaded: Any = set_peft_model_state_dict(adapted, own)
    filled = {id(p) for n, p in _all_names(adapted) if n not in loaded.missing_keys}
    missing = [n for n, p in _all_names(adapted) if p.requires_grad and id(p) not in filled]
    if missing or loaded.unexpected_keys:
        name = [*missing, *loaded.unexpected_keys][0]
        raise ValueError(f"its file {'lacks' if missing else 'has the unknown'} tensor '{name}'")
    return adapted.eval()


def _all_names(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return model.named_parameters(remove_duplicate=False)
