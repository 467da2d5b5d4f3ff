"""Where the attacker looks next: halfway between its best mixtures and their neighbours.

A protected landscape has more than one optimum: next to the valley at scale 1 there may be others,
narrower than a grid. So the search goes on around several of them and never from the first alone.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from trap2.auditing.arena import Mixture

PEAKS = 2
"""Optima around which the search goes on."""


def peaks(mixtures: Sequence[Mixture], gain: Callable[[Mixture], float]) -> list[Mixture]:
    """The local optima of a grid, the highest first; of equally high ones the first.

    Args:
        mixtures: A grid: what differs in its coefficients alone lies on one line.
        gain: What is looked for.
    """
    found = [
        mixture
        for mixture in mixtures
        if all(gain(mixture) >= gain(other) for other in neighbours(mixture, mixtures))
    ]
    return sorted(found, key=lambda mixture: -gain(mixture))


def neighbours(mixture: Mixture, mixtures: Sequence[Mixture]) -> list[Mixture]:
    """The mixtures next to one on its line: of equal members and parameters, by coefficients."""
    line = [replace(mixture, coefficients=c) for c in sorted(_line(mixture, mixtures))]
    place = line.index(mixture)
    return [*line[max(0, place - 1) : place], *line[place + 1 : place + 2]]


def halfway(mixture: Mixture, mixtures: Sequence[Mixture]) -> list[Mixture]:
    """The mixtures halfway between one and its neighbours."""
    return [
        replace(
            mixture,
            coefficients=tuple(
                round((a + b) / 2, 10)  # for the record: 0.15, not 0.15000000000000002
                for a, b in zip(mixture.coefficients, other.coefficients, strict=True)
            ),
        )
        for other in neighbours(mixture, mixtures)
    ]


def moved(mixture: Mixture, place: int, values: Iterable[float]) -> list[Mixture]:
    """The mixture with each of these values as the coefficient in one place."""
    before, after = mixture.coefficients[:place], mixture.coefficients[place + 1 :]
    return [replace(mixture, coefficients=(*before, value, *after)) for value in values]


def _line(mixture: Mixture, mixtures: Sequence[Mixture]) -> set[tuple[float, ...]]:
    alike = (m for m in mixtures if m.members == mixture.members and m.params == mixture.params)
    return {mixture.coefficients, *(m.coefficients for m in alike)}
