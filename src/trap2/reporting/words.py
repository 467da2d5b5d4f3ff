"""Numbers and names as words: the smallest pieces of every table, page and figure.

Every name in a record may come from a stranger, so each one passes `clean` on its way out.
"""

import re

from trap2.schema import Interval

NONE = "\N{EN DASH}"


def clean(text: object, limit: int = 60) -> str:
    """Make text of unknown origin safe to lay out: one line, visible characters, bounded length.

    Args:
        text: A name, label, path or sentence.
        limit: Most characters to keep; what is cut is marked by an ellipsis.
    """
    line = " ".join(str(text).split())
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)
    line = re.sub(r"(\S{99})\S{2,}", "\\1\N{HORIZONTAL ELLIPSIS}", line)  # no word fills a page
    return line if len(line) <= limit else line[: limit - 1] + "\N{HORIZONTAL ELLIPSIS}"


def percent(value: float | None, interval: Interval | None = None) -> str:
    """A fraction as `95.0%`, with its interval as `95.0% (93.1 to 96.9)`; unmeasured as a dash."""
    if value is None:
        return NONE
    return f"{100 * value:.1f}%" + (f" ({between(interval)})" if interval else "")


def points(value: float | None, interval: Interval | None = None) -> str:
    """A difference of fractions as `0.6 points`, with its interval; unmeasured as a dash."""
    if value is None:
        return NONE
    return f"{_tenths(value)} points" + (f" ({between(interval)})" if interval else "")


def retained_interval(unmergeability: Interval | None) -> Interval | None:
    """The interval of the retained skill from that of the unmergeability."""
    return (1 - unmergeability[1], 1 - unmergeability[0]) if unmergeability else None


def between(interval: Interval) -> str:
    """The ends of an interval of fractions in per cent, as `93.1 to 96.9`."""
    return f"{_tenths(interval[0])} to {_tenths(interval[1])}"


def _tenths(value: float) -> str:
    return f"{round(100 * value, 1) + 0.0:.1f}"  # never "-0.0"
