"""One merge, as the attacker thinks of it: names and numbers, no weights."""

from dataclasses import dataclass
from typing import Literal

Split = Literal["validation", "test"]


@dataclass(frozen=True)
class Mixture:
    """One merge: who takes part, at which coefficients, by which attack."""

    attack: str
    members: tuple[str, ...]
    coefficients: tuple[float, ...]
    params: tuple[tuple[str, float], ...] = ()

    def coefficient_of(self, member: str) -> float:
        """The coefficient of one member, 0 if it takes no part."""
        if member not in self.members:
            return 0.0
        return self.coefficients[self.members.index(member)]
