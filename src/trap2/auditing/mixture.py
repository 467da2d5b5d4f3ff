"""One merge, as the attacker thinks of it: names and numbers, no weights."""

from dataclasses import dataclass
from typing import Literal

Whole = Literal["validation", "test"]
Split = Literal["validation", "early", "test"]
"""Which rows of a task: "early" are the first of the validation rows."""


@dataclass(frozen=True)
class Mixture:
    """One merge: who takes part, at which coefficients, by which attack.

    An attack by parts of the model has several coefficients per member, side by side.
    """

    attack: str
    members: tuple[str, ...]
    coefficients: tuple[float, ...]
    params: tuple[tuple[str, float], ...] = ()

    @property
    def is_unchanged(self) -> bool:
        """Whether its weights are those of one release as it is, or of the base."""
        plain = self.attack == "task_arithmetic" and len(self.members) == 1
        return plain and self.coefficients[0] in (0.0, 1.0)

    def of(self, member: str) -> tuple[float, ...]:
        """The coefficients of one member, one for each part; none if it is not merged."""
        if member not in self.members:
            return ()
        parts = len(self.coefficients) // len(self.members)
        place = parts * self.members.index(member)
        return self.coefficients[place : place + parts]

    def coefficient_of(self, member: str) -> float:
        """The coefficient of one member, the largest of its parts; 0 if it takes no part."""
        return max(self.of(member), key=abs, default=0.0)
