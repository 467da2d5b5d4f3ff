"""peft's `add_weighted_adapter`, every combination type of it, on the adapters as released.

Symbols: A_i, B_i factors of adapter i; s_i its scaling; c_i coefficient, peft's weight; m the
method named. Types that work on factors combine A and B each by itself, so that products of one
model's B with another's A get in; types ending in `svd` combine the updates, and keep of the
result as many singular values as the largest adapter has ranks; `cat` is exact:

    linear, ties, dare_*, magnitude_prune    dW = m(sqrt(c_i s_i) B_i) m(sqrt(c_i s_i) A_i)
    svd, *_svd                               dW = top_r m(c_i s_i B_i A_i)
    cat                                      dW = sum_i c_i s_i B_i A_i

What it gets wrong is what an attacker who calls it gets, and stays; its tests say what that is.
Adapters are on layers that take no memory; peft is imported only when it is run.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trap2.adapters import layer_of, tree
from trap2.attacks.attack import COEFFICIENTS, Merged, Setting, attack
from trap2.attacks.ties import COEFFICIENTS as OF_A_MEAN
from trap2.attacks.tool import Tool, with_parameters
from trap2.attacks.vectors import TaskVector
from trap2.errors import UserError
from trap2.files import read_json
from trap2.provenance import installed
from trap2.update import Factors, Update

PAPER = "https://github.com/huggingface/peft"
MERGED = "merged"
Parameters = dict[str, tuple[Setting, ...]]

PRUNED: Parameters = {"density": (0.2, 0.5)}
DRAWN: Parameters = {"density": (0.5,), "seed": (0,)}
CUT: Parameters = {"rank": (0,)}
"""Rank that an SVD keeps; 0 leaves it to peft, which takes the largest adapter's."""

COMBINATIONS: dict[str, Parameters] = {
    "cat": {},
    "linear": {},
    "ties": PRUNED,
    "dare_linear": DRAWN,
    "dare_ties": DRAWN,
    "magnitude_prune": PRUNED,
    "svd": CUT,
    "ties_svd": PRUNED | CUT,
    "dare_linear_svd": DRAWN | CUT,
    "dare_ties_svd": DRAWN | CUT,
    "magnitude_prune_svd": PRUNED | CUT,
}
"""Combination types, each with the values tried of its parameters; `seed` is of the masks."""


def check(updates: Sequence[TaskVector]) -> None:
    """Refuse updates that are no LoRA adapters.

    Raises:
        UserError: One is not.
    """
    remedy = "leave the attacks 'peft_...' out, or use those of mergekit"
    for vector in updates:
        update = vector.update
        if update is None:
            raise UserError(
                "peft combines adapters as released, and a given update is none, or its basis was "
                f"changed; {remedy}"
            )
        if update.kind != "lora":
            raise UserError(
                f"peft combines LoRA adapters, and {update.folder} is of kind {update.kind}; "
                f"{remedy}"
            )
        whole = [name for name in update.shared if update.factors(name) is None]
        if whole:
            raise UserError(
                f"peft combines LoRA adapters, and {update.folder} also changes '{whole[0]}' as a "
                f"whole; {remedy}"
            )


def _combination(kind: str) -> Callable[..., Merged]:
    def combine(
        updates: Sequence[TaskVector], coefficients: Sequence[float], **params: Setting
    ) -> Iterator[tuple[str, Tensor]]:
        """Combine adapters as peft does; the types and their formulas are above."""
        serials = tuple(vector.serial for vector in updates)
        adapted = updates[0].remember(("peft",), lambda: _Adapted(updates), serials)
        yield from adapted.combined(kind, coefficients, params).items()

    return with_parameters(combine, COMBINATIONS[kind])


class _Adapted:
    """Layers with every adapter on them, by the names that the base has for them."""

    def __init__(self, updates: Sequence[TaskVector]) -> None:
        from peft import get_peft_model

        check(updates)
        releases = [vector.update for vector in updates if vector.update is not None]
        factors = [_factors(release) for release in releases]
        configs = [_config(*pair) for pair in zip(releases, factors, strict=True)]
        self._layers = {
            name: _layer(releases[0], name, found)
            for adapter in factors
            for name, found in adapter.items()
        }
        with torch.random.fork_rng(devices=[]):
            root = tree({name.removesuffix(".weight"): m for name, m in self._layers.items()})
            self._model: Any = get_peft_model(root, configs[0], adapter_name="0")
            for place, config in enumerate(configs[1:], 1):
                self._model.add_adapter(str(place), config)
        self._names = [str(place) for place in range(len(configs))]
        for adapter, found in zip(self._names, factors, strict=True):
            for name, pair in found.items():
                _fill(self._adapter(name), adapter, pair)

    def _adapter(self, name: str) -> Any:
        return self._model.base_model.model.get_submodule(name.removesuffix(".weight"))

    def combined(
        self, kind: str, coefficients: Sequence[float], params: Mapping[str, Setting]
    ) -> dict[str, Tensor]:
        """The update of one combination by base tensor name."""
        told = _told(self._names, coefficients, kind, params)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(params.get("seed", 0)))
                self._model.add_weighted_adapter(**told)
            return {
                name: self._adapter(name).get_delta_weight(MERGED).detach().float()
                for name in self._layers
            }
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"peft refuses the combination type '{kind}': {reason}; use cat, svd or another"
            ) from error
        finally:
            if MERGED in self._model.peft_config:
                self._model.delete_adapter(MERGED)


def _factors(release: Update) -> dict[str, Factors]:
    found = {name: release.factors(name) for name in release.shared}
    return {name: pair for name, pair in found.items() if pair is not None}


def _config(release: Update, factors: Mapping[str, Factors]) -> Any:
    """The adapter's own settings, its layers by the names that the base has for them."""
    from peft import LoraConfig

    own = read_json(release.folder / "adapter_config.json")
    rooted = bool(own.get("use_rslora"))
    modules = {name.removesuffix(".weight"): pair for name, pair in factors.items()}
    ranks = {name: len(pair.A) for name, pair in modules.items()}
    return LoraConfig(
        r=own["r"],
        lora_alpha=own["lora_alpha"],
        use_rslora=rooted,
        fan_in_fan_out=bool(own.get("fan_in_fan_out")),
        target_modules=[*modules],
        rank_pattern={name: rank for name, rank in ranks.items() if rank != own["r"]},
        alpha_pattern={
            name: pair.scaling * (ranks[name] ** 0.5 if rooted else ranks[name])
            for name, pair in modules.items()
        },
    )


def _layer(release: Update, name: str, found: Factors) -> Any:
    """A layer of the base's shape that takes no memory."""
    shape = release.base.shape(name)
    config = read_json(release.folder / "adapter_config.json")
    rows = found.suffixes[0] == "lora_embedding_A"
    with torch.device("meta"):
        layer: Any = layer_of(shape, rows, bool(config.get("fan_in_fan_out")))
    layer.weight = nn.Parameter(torch.zeros(()).expand(shape), requires_grad=False)
    if getattr(layer, "bias", None) is not None:
        layer.bias = None
    return layer


def _fill(layer: Any, adapter: str, pair: Factors) -> None:
    if pair.suffixes[0] == "lora_embedding_A":
        layer.lora_embedding_A[adapter].data = pair.A
        layer.lora_embedding_B[adapter].data = pair.B
    else:
        layer.lora_A[adapter].weight.data = pair.A
        layer.lora_B[adapter].weight.data = pair.B


def _told(
    adapters: Sequence[str], coefficients: Sequence[float], kind: str, params: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of `add_weighted_adapter`."""
    given: dict[str, Any] = {
        "adapters": [*adapters],
        "weights": [float(c) for c in coefficients],
        "adapter_name": MERGED,
        "combination_type": kind,
    }
    if "density" in params:
        given["density"] = float(params["density"])
    if params.get("rank"):
        given["svd_rank"] = int(params["rank"])
    return given


def _call(kind: str) -> Callable[[Sequence[str], Sequence[float], Mapping[str, Any]], str]:
    """How a user would write it."""

    def told(
        models: Sequence[str], coefficients: Sequence[float], params: Mapping[str, Any]
    ) -> str:
        seed = [f"torch.manual_seed({int(params['seed'])})"] if "seed" in params else []
        given = _told(models, coefficients, kind, params).items()
        arguments = ", ".join(f"{key}={value!r}" for key, value in given)
        return "\n".join([*seed, f"model.add_weighted_adapter({arguments})"])

    return told


for _kind, _grid in COMBINATIONS.items():
    attack(
        f"peft_{_kind}",
        paper=PAPER,
        grid=_grid,
        coefficients=OF_A_MEAN if "ties" in _kind else COEFFICIENTS,
        tool=Tool("peft", lambda: installed("peft"), _call(_kind), check),
    )(_combination(_kind))
