"""The scale law: which scales the trap is trained at, and how much each one weighs.

Symbols: s scale; w(s) weight of a scale; [low, high] range; band half-width of the excluded
interval around s = 1, where the release is meant to work. A tuned merge looks for the rim of that
interval, so a share `focus` of the draws comes from within `near` of 1.
"""

import hashlib
import math
from dataclasses import dataclass, field

import torch

from trap2.errors import UserError

WEIGHTINGS = {"inverse": -1.0, "inverse_sqrt": -0.5, "uniform": 0.0}
"""Name of a weighting to the power p in w(s) = s^p. The chain rule gives the gradient a factor s,
which `inverse` cancels (arXiv 2601.21898; `inverse_sqrt` is its setting for language models)."""


def generator(purpose: str) -> torch.Generator:
    """A random stream of its own for each purpose, the same in every process and after a resume."""
    key = hashlib.sha256(purpose.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))


@dataclass(frozen=True, kw_only=True)
class ScaleLaw:
    """s ~ Uniform([low, 1 - band] u [1 + band, high]), a share of it near 1, weighted by w(s).

    Args:
        low: Smallest scale, > 0.
        high: Largest scale.
        band: Half-width of the interval around 1 that is never drawn.
        near: Half-width of the neighbourhood of 1 that is drawn from more often.
        focus: Share of the draws that come from that neighbourhood alone; 0 is the uniform law.
        weighting: A key of `WEIGHTINGS`.

    Raises:
        UserError: The range is empty or the weighting unknown.
    """

    low: float = field(default=0.2, metadata={"help": "smallest scale the trap is trained at"})
    high: float = field(default=1.6, metadata={"help": "largest scale the trap is trained at"})
    band: float = field(default=0.05, metadata={"help": "half-width around 1 never drawn"})
    near: float = field(default=0.28, metadata={"help": "neighbourhood of 1 drawn from more often"})
    focus: float = field(default=0.0, metadata={"help": "share of draws from it alone"})
    weighting: str = field(default="inverse", metadata={"help": "inverse|inverse_sqrt|uniform"})

    def __post_init__(self) -> None:
        if not 0 < self.low < 1 - self.band < 1 < 1 + self.band <= self.high < math.inf:
            raise UserError(
                f"scale range low={self.low}, band={self.band}, high={self.high} is empty; "
                "it needs 0 < low < 1 - band and 1 + band <= high (finite) with band > 0"
            )
        if not (0 <= self.focus <= 1 and (self.focus == 0 or self.near > self.band)):
            raise UserError(
                f"focus={self.focus}, near={self.near}: no such neighbourhood of 1; it needs "
                f"0 <= focus <= 1 and near > band ({self.band})"
            )
        if self.weighting not in WEIGHTINGS:
            raise UserError(
                f"weighting '{self.weighting}' is unknown; use one of {', '.join(WEIGHTINGS)}"
            )

    def draw(self, seed: int, step: int, count: int = 1) -> list[float]:
        """Draw scales for one optimizer step, exactly and without touching any random stream.

        The same (seed, step) gives the same scales in every process and after every resume.

        Args:
            seed: The run's seed.
            step: Index of the optimizer step.
            count: How many scales; with more than one, each comes from its own equal share of the
                range (stratified), so that few draws cover it.
        """
        drawn = generator(f"trap2 scale {seed} {step}")
        places = torch.rand(count, generator=drawn, dtype=torch.float64)
        places = (places + torch.arange(count)) / count
        return [self._at(place) for place in places.tolist()]

    def _at(self, place: float) -> float:
        """The scale at a place in [0, 1) of the law's cumulative distribution."""
        low, high = self.low, self.high
        if place < self.focus:
            low, high = max(low, 1 - self.near), min(high, 1 + self.near)
            place /= self.focus
        else:
            place = (place - self.focus) / (1 - self.focus)
        below, above = 1 - self.band - low, high - 1 - self.band
        u = place * (below + above)
        return low + u if u < below else 1 + self.band + (u - below)

    def weight(self, scale: float) -> float:
        """The weight w(s) of a scale."""
        return float(scale ** WEIGHTINGS[self.weighting])
