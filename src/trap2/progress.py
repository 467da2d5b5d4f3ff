"""Progress of an audit on the terminal: what is being done, how many evaluations, how fast."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from tqdm.auto import tqdm


class Progress(NamedTuple):
    """Who is told what: `say` what begins, `tick` after each evaluation, `note` what must stay."""

    say: Callable[[str], None]
    tick: Callable[[], None]
    note: Callable[[str], None] = lambda text: None


SILENT = Progress(lambda text: None, lambda: None)


@contextmanager
def audit_bar() -> Iterator[Progress]:
    """One line on stderr; its end is not known beforehand, the attacker stops when it can."""
    with tqdm(desc="audit", unit=" evaluations", bar_format="{desc}: {n}{unit}, {elapsed}") as bar:

        def say(text: str) -> None:
            bar.set_description_str(f"audit: {text}")

        def tick() -> None:
            bar.update()

        def note(text: str) -> None:
            bar.write(f"audit: {text}", file=sys.stderr)

        yield Progress(say, tick, note)
