"""What an attack is: a small function from updates to one merged update, and its registration.

Symbols: W0 base tensor; dW_i update of model i (`W_i - W0`, float32); c_i its coefficient. A merge
is `W0 + dW`; an attack yields dW tensor by tensor, so that no second model is ever held in memory.

The signature of the function is its schema. Its keyword-only parameters are its hyper-parameters;
one named `base` asks for the base tensors instead, and one named `data` for the unlabelled rows of
every model (`Unlabelled`), which makes it an attack of tier T4:

    @attack("ties", paper="https://arxiv.org/abs/2306.01708", grid={"density": (0.1, 0.2, 1.0)})
    def ties(
        updates: Sequence[TaskVector], coefficients: Sequence[float], *, density: float
    ) -> Iterator[tuple[str, Tensor]]: ...

It must yield every tensor that any update has, exactly once; `merge` checks that it did.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from inspect import Parameter, signature
from itertools import product
from types import MappingProxyType
from typing import Any, TypeAlias, TypeVar

from torch import Tensor

from trap2.attacks.tool import Tool
from trap2.attacks.unlabelled import Unlabelled
from trap2.attacks.vectors import TaskVector, Tensors
from trap2.checkpoint import Checkpoint
from trap2.errors import Trap2Error, UserError
from trap2.finite import all_finite
from trap2.registry import Registry, did_you_mean
from trap2.update import Update

BUILT_IN = (
    *("task_arithmetic", "ties", "ties_sum", "dare", "della", "breadcrumbs"),
    *("slerp", "karcher", "model_stock"),
    *("tsv", "iso_c", "iso_cts", "cart", "ties_knots", "ties_core"),
    *("dare_linear", "nuslerp", "lines", "layer_groups", "equal_norms", "consensus", "pcb", "wudi"),
    *("transforms", "by_depth", "routed"),
    *("regmean", "regmean_pp", "chain_of_merges", "fisher", "adamerging", "prodistill", "distac"),
    *("peft_combinations", "mergekit_methods"),
)
"""Modules of this package that register an attack when imported."""

TIERS = ("T1", "T2", "T3")
"""Attacker tiers in which an attack may be tuned: shared coefficient, re-labelled, per model."""

DATA_TIER = "T4"
"""The tier of every attack that asks for unlabelled rows."""

ROUTING = "routing"
"""In place of a tier: what gives each model back by itself, which no tier counts."""

NOT_TUNED = ("base", "data")
"""Keyword-only parameters that are no hyper-parameters: what is given instead of tuned."""

COEFFICIENTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.25, 1.5, 2.0)
"""Shared coefficients an attacker tries unless the attack says otherwise."""

Setting: TypeAlias = float | int | str | bool
Merged: TypeAlias = Iterable[tuple[str, Tensor]]
F = TypeVar("F", bound=Callable[..., Merged])


def equal(value: float, count: int) -> tuple[float, ...]:
    """One shared coefficient for every model."""
    return (value,) * count


@dataclass(frozen=True)
class Attack:
    """One way to merge, and what an attacker tunes in it.

    Attributes:
        name: What it is called everywhere.
        paper: Address of its source.
        tiers: Attacker tiers in which it takes part.
        function: From updates and one coefficient per model to the merged update.
        grid: The values tried for each hyper-parameter.
        models: Smallest and largest number of models; None is no limit.
        needs_base: Whether the function takes the base tensors.
        coefficients: The values tried for the shared coefficient.
        spread: Turns a shared coefficient into one coefficient per model.
        needs_data: Whether the function takes unlabelled rows of every model.
        parts: Coefficients per model, those of one model side by side.
        tool: The library that makes its merges, where it is not our own code.
    """

    name: str
    paper: str
    tiers: tuple[str, ...]
    function: Callable[..., Merged]
    grid: Mapping[str, tuple[Setting, ...]]
    models: tuple[int, int | None]
    needs_base: bool
    coefficients: tuple[float, ...]
    spread: Callable[[float, int], tuple[float, ...]] = equal
    needs_data: bool = False
    parts: int = 1
    tool: Tool | None = None

    def shared(self, value: float, models: int) -> tuple[float, ...]:
        """All coefficients of so many models at one value of the shared coefficient."""
        return self.spread(value, self.parts * models)

    @property
    def needs(self) -> tuple[str, ...]:
        """What the function takes beside updates, coefficients and what is tuned."""
        own = tuple(name for name in _keywords(self.function) if name not in self.grid)
        return own if self.tool is None else (*own, self.tool.name)

    def settings(self) -> Iterator[dict[str, Setting]]:
        """Every combination of the hyper-parameters in the grid; one empty one if there are none.

        Yields:
            Keyword arguments for `merge`.
        """
        for values in product(*self.grid.values()):
            yield dict(zip(self.grid, values, strict=True))


ATTACKS: Registry[Attack] = Registry("attack")
"""All attacks by name; `load_attacks` fills in the built-in ones."""


def load_attacks() -> Registry[Attack]:
    """Import the built-in attacks, so that all of them are in `ATTACKS`, and return it."""
    for module in BUILT_IN:
        import_module(f"trap2.attacks.{module}")
    return ATTACKS


def attack(
    name: str,
    *,
    paper: str,
    grid: Mapping[str, tuple[Setting, ...]] = MappingProxyType({}),
    tiers: tuple[str, ...] = TIERS,
    models: tuple[int, int | None] = (1, None),
    coefficients: tuple[float, ...] = COEFFICIENTS,
    spread: Callable[[float, int], tuple[float, ...]] = equal,
    parts: int = 1,
    tool: Tool | None = None,
) -> Callable[[F], F]:
    """Register a merging function as an attack; the function itself stays as it is.

    Args:
        name: What it is called.
        paper: Address of its source.
        grid: The values to try for each keyword-only parameter, `base` and `data` excepted.
        tiers: Attacker tiers in which it takes part, or `ROUTING`; one that takes `data` is in T4
            alone.
        models: Smallest and largest number of models; None is no limit.
        coefficients: The values to try for the shared coefficient.
        spread: Turns a shared coefficient into one coefficient per model.
        parts: Coefficients per model, for parts of the model.
        tool: The library that makes its merges, where it is not the function itself.

    Raises:
        UserError: The name is taken, or grid and signature do not match.
    """

    def register(function: F) -> F:
        keywords = _keywords(function)
        _check_schema(name, [k for k in keywords if k not in NOT_TUNED], grid, tiers)
        entry = Attack(
            name=name,
            paper=paper,
            tiers=(DATA_TIER,) if "data" in keywords else tiers,
            function=function,
            grid=dict(grid),
            models=models,
            needs_base="base" in keywords,
            coefficients=coefficients,
            spread=spread,
            needs_data="data" in keywords,
            parts=parts,
            tool=tool,
        )
        ATTACKS.add(name, entry)
        return function

    return register


def _keywords(function: Callable[..., Merged]) -> list[str]:
    parameters = signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is Parameter.KEYWORD_ONLY]


def _check_schema(
    name: str, keywords: list[str], grid: Mapping[str, tuple[Setting, ...]], tiers: tuple[str, ...]
) -> None:
    """Compare what a function takes with what its registration says."""
    for key in keywords:
        if not grid.get(key):
            raise UserError(
                f"attack '{name}' takes '{key}', but its grid has no values for it; "
                f"add '{key}' to the grid"
            )
    for key in grid:
        if key not in keywords:
            raise UserError(
                f"attack '{name}' has '{key}' in its grid, but its function takes no keyword-only "
                f"parameter of that name; it takes: {', '.join(keywords) or 'none'}"
            )
    for tier in tiers:
        if tier not in (*TIERS, ROUTING):
            raise UserError(f"attack '{name}' has tier '{tier}'; use {', '.join(TIERS)}")


def merge(
    attack: Attack | str,
    updates: Sequence[Update | Mapping[str, Tensor]],
    coefficients: float | Sequence[float],
    *,
    base: Checkpoint | Mapping[str, Tensor] | None = None,
    data: Sequence[Unlabelled] = (),
    **params: Setting,
) -> Iterator[tuple[str, Tensor]]:
    """Merge updates with one attack, tensor by tensor.

    The input is checked at once; the merged tensors are worked out as they are asked for, and each
    is checked: finite, and every tensor that any update has yielded exactly once. An attack with
    data works all of them out at once, for it runs the live model, which must hold its base then.

    Args:
        attack: An attack or its name.
        updates: What is merged: `Update`s, `TaskVector`s or plain mappings of deltas.
        coefficients: One shared coefficient, or one per model.
        base: The base tensors for an attack that needs them; by default those of the updates.
        data: Unlabelled rows of every model, in the order of the updates, for an attack that
            needs them.
        **params: The attack's hyper-parameters.

    Returns:
        Iterator over (base tensor name, merged dW in float32).

    Raises:
        UserError: The number of models or coefficients, a hyper-parameter or the base is wrong.
        Trap2Error: While iterating: the attack gave NaN or infinity, or left tensors out.
    """
    chosen = load_attacks().get(attack) if isinstance(attack, str) else attack
    _check_count(chosen, len(updates))
    weights = (
        chosen.shared(coefficients, len(updates))
        if isinstance(coefficients, int | float)
        else tuple(coefficients)
    )
    _check_coefficients(chosen, weights, len(updates))
    _check_params(chosen, params)
    vectors = [TaskVector.of(update) for update in updates]
    given: dict[str, Any] = {}
    if chosen.needs_base:
        given["base"] = _base_of(chosen, vectors, updates, base)
    else:
        common_base(updates)
    if chosen.needs_data:
        _check_data(chosen, data, len(updates))
        given["data"] = data
    merged = chosen.function(vectors, weights, **given, **params)
    if chosen.needs_data:
        merged = list(merged)
    label = f"attack '{chosen.name}' with coefficients {weights} and {params or 'no parameters'}"
    return _checked(label, merged, dict.fromkeys(name for vector in vectors for name in vector))


def _check_count(chosen: Attack, count: int) -> None:
    low, high = chosen.models
    if count < low or (high is not None and count > high):
        wanted = f"{low}" if low == high else f"{low} or more" if high is None else f"{low}-{high}"
        raise UserError(
            f"attack '{chosen.name}' merges {wanted} models, but got {count}; "
            "give that many updates or use another attack"
        )


def _check_coefficients(chosen: Attack, weights: Sequence[float], count: int) -> None:
    if len(weights) != count * chosen.parts:
        each = "one" if chosen.parts == 1 else str(chosen.parts)
        raise UserError(
            f"attack '{chosen.name}' got {len(weights)} coefficients for {count} models; "
            f"give one shared coefficient or {each} per model"
        )
    for weight in weights:
        if not math.isfinite(weight):
            raise UserError(
                f"attack '{chosen.name}' got the coefficient {weight}, which no merge can use; "
                "give finite numbers"
            )


def _check_data(chosen: Attack, data: Sequence[Unlabelled], count: int) -> None:
    if len(data) != count:
        raise UserError(
            f"attack '{chosen.name}' got unlabelled rows of {len(data)} models for {count}; "
            "give data= with the rows of every model"
        )


def _check_params(chosen: Attack, params: Mapping[str, Setting]) -> None:
    known = list(chosen.grid)
    for key in params:
        if key not in known:
            raise UserError(
                f"attack '{chosen.name}' has no parameter '{key}';{did_you_mean(key, known)} "
                f"it has: {', '.join(known) or 'none'}"
            )
    defaults = signature(chosen.function).parameters
    for key in known:
        if key not in params and defaults[key].default is Parameter.empty:
            raise UserError(
                f"attack '{chosen.name}' needs '{key}', which has no default; "
                f"give one, such as {key}={chosen.grid[key][0]}"
            )


def common_base(updates: Sequence[Update | Mapping[str, Tensor]]) -> Checkpoint | None:
    """The base that all `Update`s among the updates were opened with.

    Raises:
        UserError: They were opened with different ones.
    """
    bases = {u.base.folder.resolve(): u.base for u in updates if isinstance(u, Update)}
    first, *others = bases.values() or (None,)
    for other in others:
        if first is not None and other is not None and other.digest != first.digest:
            raise UserError(
                f"the updates are of two bases, {first.folder} and {other.folder}; "
                "only updates of one base can be merged"
            )
    return first


def _base_of(
    chosen: Attack,
    vectors: Sequence[TaskVector],
    updates: Sequence[Update | Mapping[str, Tensor]],
    base: Checkpoint | Mapping[str, Tensor] | None,
) -> Tensors:
    """The base tensors for an attack that needs them, all of those that the updates change."""
    found = common_base(updates) if base is None else base
    if found is None:
        raise UserError(
            f"attack '{chosen.name}' interpolates whole weights, but the updates given name no "
            "base; give base="
        )
    known = Tensors.of_base(found)
    for name in (name for vector in vectors for name in vector):
        if name not in known:
            raise UserError(
                f"an update changes '{name}', which the base does not have; "
                "give the base it was trained on"
            )
    return known


def _checked(label: str, merged: Merged, expected: dict[str, None]) -> Iterator[tuple[str, Tensor]]:
    """Pass tensors on, each finite; afterwards, all of the expected ones exactly once."""
    missing = dict(expected)
    for name, delta in merged:
        if name not in missing:
            reason = "twice" if name in expected else "though no update has it"
            raise Trap2Error(f"{label} yielded '{name}' {reason}; correct the attack's function")
        del missing[name]
        if not all_finite(delta):
            raise Trap2Error(
                f"{label} gave NaN or infinity in '{name}'; "
                "use smaller coefficients, and check that the updates are finite"
            )
        yield name, delta
    if missing:
        raise Trap2Error(
            f"{label} left out {len(missing)} of {len(expected)} tensors, such as "
            f"'{next(iter(missing))}'; a merge must yield every tensor that an update changes, "
            "or the rest would silently stay at the base"
        )
