"""Where the attacker looks next when coefficients are many: CMA-ES, one generation at a time.

Coordinate descent changes one coefficient at a time and stops where two would have to move
together. CMA-ES (Hansen 2016, arXiv 1604.00772) draws mixtures around a mean and learns from the
better half which coefficients move together. Its library is `cma`, in the extra `search`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from trap2.errors import UserError

WIDTH = 0.25
"""Standard deviation of the first generation: a fourth of an update."""

BOUNDS = (0.0, 3.0)
"""Smallest and largest coefficient drawn."""

Point = tuple[float, ...]


def evolved(
    start: Point,
    others: Sequence[Point],
    loss: Callable[[Point], float],
    *,
    budget: int,
    seed: int,
) -> list[Point]:
    """Search for the point of least loss.

    Args:
        start: Mean of the first generation, one coefficient or more.
        others: Points that the first generation holds beside those it draws.
        loss: What to minimise; not asked twice for one point.
        budget: How many points may be tried.
        seed: Seed of all draws; numpy's global generator is not touched.

    Returns:
        The points tried, in their order.

    Raises:
        UserError: The library is not installed.
    """
    search = _library().CMAEvolutionStrategy(list(start), WIDTH, _options(seed, len(start)))
    known: dict[Point, float] = {}
    search.inject([list(point) for point in others], force=True)
    while len(known) < budget and not search.stop():
        drawn = search.ask()
        points = [tuple(round(float(c), 4) for c in point) for point in drawn]
        for point in points:
            if point not in known and len(known) < budget:
                known[point] = loss(point)
        if any(point not in known for point in points):
            break  # a generation cut short by the budget teaches nothing
        search.tell(drawn, [known[point] for point in points])
    return [*known]


def _options(seed: int, coefficients: int) -> dict[str, Any]:
    draw = np.random.default_rng(seed)
    return {
        "bounds": list(BOUNDS),
        "seed": np.nan,  # to the library: leave numpy's global generator alone
        "randn": lambda *shape: draw.standard_normal(shape),
        "verbose": -9,
        "verb_log": 0,
        "CMA_diagonal": False,
        "popsize": 4 + int(3 * np.log(coefficients)) if coefficients > 1 else 4,
    }


def _library() -> Any:
    try:
        import cma
    except ImportError as error:
        raise UserError(
            "attacker.t3_search has 'cma', which needs the library cma; install trap2[search]"
        ) from error
    return cma
