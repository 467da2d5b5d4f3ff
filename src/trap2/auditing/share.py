"""What partners keep in a mixture, and how sure a part of the rows makes us of it.

A look at the first of the validation rows is enough to give up a mixture that ruins its partners.
Rows are shuffled, so the first are a draw without replacement, and Serfling's inequality
(doi:10.1214/aos/1176342611) bounds how far their mean score lies under that of all rows:
sub-Gaussian, with variance (1 - (n - 1) / N) / (4 n). Partners' rows are drawn apart, so in the
mean of their shares the variances add up.

Symbols: n rows seen of N; P partners; r accuracy of a partner without the release.
"""

import math
from collections.abc import Sequence

from trap2.tasks.evaluation import Evaluation

ERROR = 1e-4
"""Largest chance that a mixture is given up which all rows would have let pass."""


def share_kept(found: Sequence[Evaluation], without: Sequence[Evaluation]) -> tuple[float, float]:
    """Mean over partners of accuracy in a mixture over accuracy without the release.

    Args:
        found: Of each partner in the mixture, on all rows or the first of them.
        without: Of each partner without the release, on all rows.

    Returns:
        The share, and how much more it may be on all rows: 0 if these are all.
    """
    shares, variance = [], 0.0
    for mine, reference in zip(found, without, strict=True):
        weight = 1 / max(1e-9, reference.accuracy)
        shares.append(mine.accuracy * weight)
        n, rows = len(mine), len(reference)
        if n < rows:
            variance += (weight / len(found)) ** 2 * (1 - (n - 1) / rows) / (4 * n)
    return sum(shares) / len(shares), math.sqrt(2 * math.log(1 / ERROR) * variance)
