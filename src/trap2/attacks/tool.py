"""Another library that makes the merges of an attack, as attackers themselves would call it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any, TypeVar

from trap2.attacks.vectors import TaskVector

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Tool:
    """A library, and what is recorded of a merge it makes.

    Attributes:
        name: The library.
        version: Its version where it would run; a `UserError` where it is not installed.
        told: What it is told for a merge, as its users write it, from the names of the models,
            their coefficients and the attack's parameters.
        check: Refuses, with a `UserError`, updates that it cannot merge.
    """

    name: str
    version: Callable[[], str]
    told: Callable[[Sequence[str], Sequence[float], Mapping[str, Any]], str]
    check: Callable[[Sequence[TaskVector]], None]

    def recorded(
        self, models: Sequence[str], coefficients: Sequence[float], params: Mapping[str, Any]
    ) -> dict[str, str]:
        """What a record says of one merge."""
        return {
            "name": self.name,
            "version": self.version(),
            "told": self.told(models, coefficients, params),
        }


def with_parameters(function: F, grid: Mapping[str, tuple[Any, ...]]) -> F:
    """A function that takes any keywords, as one that takes those of a grid.

    For methods of a library that share one function; its other parameters stay.
    """
    shape = signature(function)
    kept = [p for p in shape.parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
    own = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=values[0]) for name, values in grid.items()
    ]
    function.__signature__ = shape.replace(parameters=[*kept, *own])  # type: ignore[attr-defined]
    return function
