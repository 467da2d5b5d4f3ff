"""What every figure shares: its style, its colours, and how it becomes a page's `<svg>` or a file.

Nothing here touches pyplot, the user's backend or style. The same record gives the same bytes.
Blue and vermilion stay apart for colour-blind readers; marker and dash repeat the difference. In a
file a figure is drawn on white; in a page its colours are the page's, so it is legible on dark
ground too.
"""

import functools
import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, TypeVar

import matplotlib.style
from matplotlib.figure import Figure

from trap2.errors import UserError
from trap2.files import write_text
from trap2.schema import Report

INK, SOFT, LINE, GROUND = "#1b1f24", "#595959", "#e3e3e3", "#ffffff"
GOOD, FREE = "#009e73", "#f0e442"
RELEASE: dict[str, Any] = {"color": "#0072b2", "marker": "o", "linestyle": "-"}
CONTROL: dict[str, Any] = {"color": "#d55e00", "marker": "s", "linestyle": "--"}
NAMES = {"release": "release (protected)", "control": "control (no trap)"}
LOOKS = {"release": RELEASE, "control": CONTROL}

_PAGE_COLOURS = {
    INK: "ink",
    SOFT: "soft",
    LINE: "line",
    GROUND: "ground",
    RELEASE["color"]: "release",
    CONTROL["color"]: "control",
}
"""The page's own name, as a CSS variable, of each colour that must change with its ground."""

_STYLE: dict[str, Any] = {
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LINE,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.markersize": 5,
    "svg.fonttype": "none",  # words stay words: selectable, and set in the page's font
    "text.parse_math": False,  # a `$` in a name is a dollar
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class Drawing:
    """A figure, its title, and what it shows in words for those who do not see it."""

    name: str
    figure: Figure
    title: str
    description: str


Drawn = TypeVar("Drawn", Drawing, "Drawing | None")


def drawn(draw: Callable[[Report], Drawn]) -> Callable[[Report], Drawn]:
    """Let a function draw in our style, whatever the user's is, and leave theirs as it was."""

    @functools.wraps(draw)
    def styled(report: Report) -> Drawn:
        with _style(draw.__name__):
            return draw(report)

    return styled


def svg(drawing: Drawing, page: bool = True) -> str:
    """The bare `<svg>` element, with title and description, its ids apart from the rest of a page.

    Args:
        drawing: What to write.
        page: Take the colours from the page it stands in, and leave its ground free.
    """
    name, stream = f"figure-{drawing.name}", io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with _style(drawing.name):
        drawing.figure.savefig(stream, format="svg", metadata=nothing, transparent=page)
    whole = stream.getvalue()
    whole = whole[whole.index("<svg") :]
    whole = re.sub(r"<[^>]*>", functools.partial(_tag, name, page), whole)
    whole = whole.replace("*{stroke-linejoin", f"#{name} *{{stroke-linejoin", 1)
    labels = f'role="img" aria-labelledby="{name}-title {name}-desc"'
    words = (
        f'<title id="{name}-title">{escape(drawing.title)}</title>'
        f'<desc id="{name}-desc">{escape(drawing.description)}</desc>'
    )
    whole = whole.replace("<svg", f'<svg id="{name}" {labels}', 1)
    return whole.replace(">", f">{words}", 1)


def save(drawing: Drawing, path: Path) -> None:
    """Write a figure as a file, `.png` or `.svg`, so that it is whole or absent.

    Raises:
        UserError: Another suffix, or the place is not writable.
    """
    if path.suffix == ".svg":
        write_text(path, svg(drawing, page=False))
        return
    if path.suffix != ".png":
        raise UserError(f"{path} is neither .png nor .svg; choose one of these suffixes")
    partial = path.with_name(path.name + ".partial")
    try:
        with _style(drawing.name):
            drawing.figure.savefig(partial, format="png", dpi=200, metadata={"Software": None})
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {path}: {error.strerror}; free space or choose another place"
        ) from error


def _tag(name: str, page: bool, tag: re.Match[str]) -> str:
    """One tag with ids and colours of its own; in the text between tags `<` is always escaped."""
    changed = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{name}-", tag[0])
    if page:
        for colour, variable in _PAGE_COLOURS.items():
            changed = changed.replace(f": {colour}", f": var(--{variable}, {colour})")
    return changed


@contextmanager
def _style(salt: str) -> Iterator[None]:
    with (
        matplotlib.style.context(["default", _STYLE | {"svg.hashsalt": salt}]),
        warnings.catch_warnings(),
    ):
        # A name in a script without glyphs here: the browser has them, a PNG shows boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield
