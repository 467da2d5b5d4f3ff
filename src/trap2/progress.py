"""Progress of an audit on the terminal: what is being done, how many evaluations, how fast."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from tqdm.auto import tqdm


class Progress(NamedTuple):
    """Who is told what: `say` a few words on what begins, `tick` after each evaluation."""

    say: Callable[[str], None]
    tick: Callable[[], None]


SILENT = Progress(lambda text: None, lambda: None)


@contextmanager
def audit_bar() -> Iterator[Progress]:
    """One line on stderr; its end is not known beforehand, the attacker stops when it can."""
    with tqdm(desc="audit", unit=" evaluations", bar_format="{desc}: {n}{unit}, {elapsed}") as bar:

        def say(text: str) -> None:
            bar.set_description_str(f"audit: {text}")

        def tick() -> None:
            bar.update()

        yield Progress(say, tick)
