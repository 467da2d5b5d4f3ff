"""How far chance in the test rows reaches: 95 % intervals by resampling rows (Efron 1979).

Every resample draws as many rows as there are, with replacement, and the same ones for base,
standalone and merged accuracy, of release and control, under every attack: rows that are hard for
all of them move all of them. Maps of the outputs are fitted once, as the attacker does; only the
rows they are scored on are drawn again. What the attacker chose on validation rows is not.

Symbols: a0 base, a1 standalone, m merged accuracy; R retained skill; U unmergeability; B resamples.
"""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from trap2.auditing.arena import CONTROL, RELEASE, Arena
from trap2.auditing.attacker import Catch
from trap2.auditing.mixture import Mixture
from trap2.auditing.verdict import TIERS, Spread
from trap2.schema import Interval, Tier
from trap2.tasks.relabel import relabelled_correct

Floats: TypeAlias = NDArray[np.float64]
Key: TypeAlias = tuple[str, str, int]
"""An attack, its tier, and the labelled rows it learns from."""

Retained: TypeAlias = dict[Key, Floats]
"""The retained skill of every attack in every resample."""

RESAMPLES = 2000
LEVEL = 0.95


class Bootstrap:
    """Resamples of the protected task's test rows; the first is the sample itself.

    Args:
        arena: The audit, whose seed draws the rows.
    """

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._rows = len(arena.members[RELEASE].evaluators["test"])
        draw = np.random.default_rng([arena.spec.seed, self._rows])
        drawn = draw.multinomial(self._rows, np.full(self._rows, 1 / self._rows), RESAMPLES)
        self._counts = np.concatenate([np.ones((1, self._rows)), drawn])

    def accuracy(self, mixture: Mixture, side: str, rows: int) -> Floats:
        """Accuracy (B,) of the protected task in a mixture, re-labelled if `rows` is not 0."""

        def found() -> Floats:
            test = self._arena.evaluate(mixture, side, "test")
            scores: Floats = test.scores.double().numpy()
            if rows:
                fit = self._arena.evaluate(mixture, side, "validation")
                scores = relabelled_correct(fit, test, rows).astype(np.float64)
            return self.resampled(scores)

        return self._arena.remember(("resampled", mixture, side, rows), found)

    def resampled(self, scores: Floats) -> Floats:
        """Accuracy (B,) where these test rows (N,) are done so well."""
        counted: Floats = self._counts @ scores / self._rows
        return counted

    def retained(self, side: str, catches: Mapping[Key, Catch]) -> Retained:
        """R (2, B) of every attack on one side: see `retained_share`."""
        base, alone = (self._arena.alone(side, s) for s in (0.0, 1.0))
        return {
            key: retained_share(
                self.accuracy(catch.mixture if catch.admissible else base, side, catch.rows),
                self.accuracy(base, side, catch.rows),
                self.accuracy(alone, side, catch.rows),
            )
            for key, catch in catches.items()
        }

    def utility_cost(self) -> Interval | None:
        """The interval of control minus standalone; None without a control."""
        if CONTROL not in self._arena.sides:
            return None
        control, release = (
            self.accuracy(self._arena.alone(side), side, 0) for side in (CONTROL, RELEASE)
        )
        return interval(np.stack([control - release] * 2))


def retained_share(merged: Floats, base: Floats, standalone: Floats) -> Floats:
    """R of every resample, twice: where there is no skill it is anything, so once 0 and once 1.

    Args:
        merged: m (B,).
        base: a0 (B,).
        standalone: a1 (B,).

    Returns:
        (2, B): the least and the most that R can be.
    """
    skill = standalone - base
    kept = np.clip((merged - base) / np.where(skill > 0, skill, 1), 0, 1)
    return np.stack([np.where(skill > 0, kept, anything) for anything in (0.0, 1.0)])


def unmergeability(retained: Sequence[Floats]) -> Floats:
    """U (2, B), least and most, of attacks with R (2, B): in every resample the worst counts."""
    worst: Floats = np.max(retained, axis=0)
    return 1 - worst[::-1]


def spreads(retained: Mapping[str, Retained]) -> dict[Tier, Spread]:
    """The intervals of unmergeability of every tier, the ones before it included.

    Args:
        retained: By side, R of every attack.
    """

    def spread(side: str, tiers: Sequence[str]) -> Interval:
        return interval(
            unmergeability([kept for key, kept in retained[side].items() if key[1] in tiers])
        )

    return {
        tier: (
            spread(RELEASE, TIERS[: place + 1]),
            spread(CONTROL, TIERS[: place + 1]) if CONTROL in retained else None,
        )
        for place, tier in enumerate(TIERS)
        if any(key[1] == tier for key in retained[RELEASE])
    }


def interval(values: Floats) -> Interval:
    """The percentile interval of (2, B) least and most; it always holds the sample's own value.

    The worst of many attacks gets worse by chance, so resamples lie on the attacker's side of the
    sample: an interval may begin or end in it.
    """
    tail = (1 - LEVEL) / 2
    low = min(np.quantile(values[0, 1:], tail), values[0, 0])
    high = max(np.quantile(values[1, 1:], 1 - tail), values[1, 0])
    return float(low), float(high)
