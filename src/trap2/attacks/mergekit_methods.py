"""mergekit's methods, made by mergekit itself: what an attacker with a YAML file gets.

Symbols: W0 base tensor; dW_i update and W_i = W0 + dW_i weights of model i; c_i coefficient; c the
largest of them; M what mergekit writes. Where a method has a place for coefficients they go there:

    weights     weight: c_i / c and lambda: c    dW = M - W0
    sum         weight: c_i, of W0 1 - sum c_i   dW = M - W0    the weighted sum of whole weights
    place       weight: c_i, or t: c_2           dW = M - W0    from the first model to the second
    shares      weight: c_i / c                  dW = c (M - W0)
    scaled      nothing                          dW = c (M - W0)

`mergekit-pytorch` is used and not `mergekit-yaml`, for it knows tensors alone and so any
architecture: the other leaves out tensors of those it does not know, without an error. mergekit's
own choices stay (TIES normalised by weights, DARE at the old L1 norm, thresholds tensor by tensor).
`passthrough` is no merge.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from trap2.attacks.attack import COEFFICIENTS, TIERS, Merged, Setting, attack, equal
from trap2.attacks.mergekit_process import installed_version, interpreter, mergekit
from trap2.attacks.slerp import ends
from trap2.attacks.ties import COEFFICIENTS as OF_A_MEAN
from trap2.attacks.tool import Tool, with_parameters
from trap2.attacks.vectors import TaskVector
from trap2.errors import UserError

PAPER = "https://github.com/arcee-ai/mergekit"
BASE = "base"
WAY = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
DRAWN: dict[str, tuple[Setting, ...]] = {"density": (0.5,), "seed": (0,)}
OUTLIERS: dict[str, tuple[Setting, ...]] = {"density": (0.15, 0.5), "gamma": (0.01,)}


@dataclass(frozen=True)
class Method:
    """One of mergekit's methods, and how coefficients reach it.

    Attributes:
        kind: Where the coefficients go: see above.
        grid: Values tried of its own parameters.
        models: Smallest and largest number of models.
        origin: What it takes for its `base_model`: the base, the first model, or nothing.
        mean: Whether it averages, so that coefficients reach further.
    """

    kind: Literal["weights", "sum", "place", "shares", "scaled"]
    grid: dict[str, tuple[Setting, ...]] = field(default_factory=dict)
    models: tuple[int, int | None] = (1, None)
    origin: Literal["base", "first", "none"] = "base"
    mean: bool = False


METHODS: dict[str, Method] = {
    "linear": Method("sum", origin="none"),
    "task_arithmetic": Method("weights"),
    "ties": Method("weights", {"density": (0.2, 1.0)}, mean=True),
    "dare_ties": Method("weights", DRAWN),
    "dare_linear": Method("weights", DRAWN),
    "breadcrumbs": Method("weights", OUTLIERS),
    "breadcrumbs_ties": Method("weights", OUTLIERS),
    "della": Method("weights", DRAWN | {"epsilon": (0.15,)}, mean=True),
    "della_linear": Method("weights", DRAWN | {"epsilon": (0.15,)}),
    "slerp": Method("place", models=(2, 2), origin="first"),
    "nuslerp": Method("place", models=(2, 2)),
    "multislerp": Method("shares", models=(2, None), mean=True),
    "karcher": Method("scaled", models=(2, None), origin="none", mean=True),
    "model_stock": Method("scaled", models=(2, None), mean=True),
    "nearswap": Method("scaled", {"t": (1e-4, 1e-3)}, models=(2, 2), origin="first"),
    "arcee_fusion": Method("scaled", models=(2, 2), origin="first"),
    "sce": Method("scaled", {"select_topk": (0.2, 1.0)}, mean=True),
    "ram": Method("scaled", mean=True),
    "ramplus_tl": Method("scaled", {"r": (0.1,), "alpha": (0.2,)}, mean=True),
}
"""Its methods that merge models of one base, by its names for them."""


def configuration(
    name: str, models: Sequence[str], coefficients: Sequence[float], params: Mapping[str, Any]
) -> tuple[dict[str, Any], float]:
    """Mergekit's configuration of one merge, and the factor of the merged update.

    Args:
        name: mergekit's name of the method.
        models: What each model is called.
        coefficients: One per model.
        params: The method's own parameters.

    Raises:
        UserError: A method without weights got different coefficients.
    """
    method = METHODS[name]
    own = {key: value for key, value in params.items() if key != "seed"}
    unit, weights = _weights(name, method, coefficients)
    given: list[dict[str, Any]] = [{"model": model} for model in models]
    if weights:
        for model, weight in zip(given, weights, strict=True):
            model["parameters"] = {"weight": weight}
    if method.kind == "sum":
        rest = round(1 - sum(coefficients), 12)
        given.append({"model": BASE, "parameters": {"weight": rest}})
        own["normalize"] = False
    if method.kind == "weights":
        own["lambda"] = unit
    if name == "slerp":
        own["t"] = coefficients[1]
    found: dict[str, Any] = {"merge_method": name, "models": given}
    if method.origin != "none":
        found["base_model"] = BASE if method.origin == "base" else models[0]
    if own:
        found["parameters"] = own
    return found, unit if method.kind in ("shares", "scaled") else 1.0


def _weights(
    name: str, method: Method, coefficients: Sequence[float]
) -> tuple[float, list[float] | None]:
    """The largest coefficient, and the weight of each model, if it takes any."""
    unit = float(max(coefficients, key=abs))
    if method.kind == "scaled":
        if len(dict.fromkeys(coefficients)) > 1:
            raise UserError(
                f"mergekit's {name} takes no weights, but got the coefficients "
                f"{tuple(coefficients)}; give one for all models"
            )
        return unit, None
    if method.kind == "place" and name == "slerp":
        return unit, None
    if method.kind in ("sum", "place"):
        return unit, [float(c) for c in coefficients]
    return unit, [c / unit if unit else 1.0 for c in coefficients]


def _told(name: str) -> Callable[[Sequence[str], Sequence[float], Mapping[str, Any]], str]:
    """The YAML of a merge, with the command that takes it."""

    def told(
        models: Sequence[str], coefficients: Sequence[float], params: Mapping[str, Any]
    ) -> str:
        settings, factor = configuration(name, models, coefficients, params)
        seed = int(params.get("seed", 0))
        head = f"# mergekit-pytorch this.yaml merged --random-seed {seed}\n"
        tail = "" if factor == 1 else f"# then: base + {factor:g} * (merged - base)\n"
        return head + yaml.safe_dump(settings, sort_keys=False) + tail

    return told


def _method(name: str) -> Callable[..., Merged]:
    def merged(
        updates: Sequence[TaskVector],
        coefficients: Sequence[float],
        *,
        base: Mapping[str, Tensor],
        **params: Setting,
    ) -> Iterator[tuple[str, Tensor]]:
        """A merge by mergekit; its methods and where coefficients go are above."""
        installed_version()
        names = tuple(dict.fromkeys(name for update in updates for name in update))
        tool = mergekit(interpreter())
        places = [str(place) for place in range(len(updates))]
        settings, factor = configuration(name, places, coefficients, params)
        files = {place: _file(u, names, base) for place, u in zip(places, updates, strict=True)}
        files[BASE] = _file(updates[0], names, base, 0.0)
        written = yaml.safe_dump(_with_paths(settings, files))
        with TemporaryDirectory(dir=tool.folder) as folder:
            out = Path(folder) / "merged"
            tool.merge(written, out, int(params.get("seed", 0)))
            for path in sorted(out.glob("*.safetensors")):
                with safe_open(path, framework="pt") as tensors:
                    for tensor in tensors.keys():  # noqa: SIM118
                        origin = base[tensor].float()
                        found = tensors.get_tensor(tensor).view(origin.shape)
                        yield tensor, factor * (found - origin)

    return with_parameters(merged, METHODS[name].grid)


def _with_paths(settings: dict[str, Any], files: Mapping[str, str]) -> dict[str, Any]:
    models = [{**model, "model": files[model["model"]]} for model in settings["models"]]
    found = {**settings, "models": models}
    if "base_model" in settings:
        found["base_model"] = files[settings["base_model"]]
    return found


def _file(
    vector: TaskVector, names: tuple[str, ...], base: Mapping[str, Tensor], s: float = 1.0
) -> str:
    """Name of a file with W0 + s dW of these tensors in float32, written once.

    A name and no path: mergekit fails on one with a space in it.
    """
    folder = mergekit(interpreter()).folder

    def write() -> str:
        tensors = {}
        for name in names:
            weight = base[name].float()
            whole = weight + s * vector[name] if name in vector else weight.clone()
            tensors[name] = whole if whole.dim() else whole.view(1)  # DELLA takes no scalars
        file = f"{len(list(folder.glob('*.safetensors')))}.safetensors"
        save_file({name: t.contiguous() for name, t in tensors.items()}, folder / file)
        return file

    mark = float(base[names[0]].double().sum()) if names else 0.0
    return vector.remember(("mergekit", str(folder), names, s, mark), write)


def _check(updates: Sequence[TaskVector]) -> None:
    """Mergekit merges whatever has tensors, where it is installed."""
    installed_version()


for _name, _entry in METHODS.items():
    _place = _entry.kind == "place"
    attack(
        f"mergekit_{_name}",
        paper=PAPER,
        grid=_entry.grid,
        tiers=("T1", "T2") if _place or _entry.kind == "scaled" else TIERS,
        models=_entry.models,
        coefficients=WAY if _place else OF_A_MEAN if _entry.mean else COEFFICIENTS,
        spread=ends if _place else equal,
        tool=Tool("mergekit", installed_version, _told(_name), _check),
    )(_method(_name))
