"""Progress of an audit on the terminal: what is being done, how many evaluations, how long yet."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from tqdm.auto import tqdm

OPEN = "{desc}: {n}{unit}, {elapsed}"
BOUND = "{desc}: {n} of {total} or more{unit}, {elapsed}, {remaining} or more to go"


class Progress(NamedTuple):
    """Who is told what.

    Attributes:
        say: What begins.
        tick: After each evaluation.
        note: What must stay on the terminal.
        expect: How many evaluations there will be at least.
    """

    say: Callable[[str], None]
    tick: Callable[[], None]
    note: Callable[[str], None] = lambda text: None
    expect: Callable[[int], None] = lambda count: None


SILENT = Progress(lambda text: None, lambda: None)


@contextmanager
def audit_bar() -> Iterator[Progress]:
    """One line on stderr. Its end is not known beforehand: after the grids the attacker chooses."""
    with tqdm(desc="audit", unit=" evaluations", bar_format=OPEN) as bar:

        def say(text: str) -> None:
            bar.set_description_str(f"audit: {text}")

        def tick() -> None:
            if bar.total is not None and bar.n >= bar.total:
                bar.total, bar.bar_format = None, OPEN
            bar.update()

        def note(text: str) -> None:
            bar.write(f"audit: {text}", file=sys.stderr)

        def expect(count: int) -> None:
            bar.total, bar.bar_format = count, BOUND

        yield Progress(say, tick, note, expect)
