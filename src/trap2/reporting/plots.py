"""The figures, drawn from the record; the only file that knows matplotlib.

Nothing here touches pyplot, the user's backend or style. The same record gives the same bytes.
Every figure has its own white background, because most of its readers sit in front of a white page
and the others get a card. Blue and vermilion stay apart for colour-blind readers; marker and dash
repeat the difference.
"""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from trap2.errors import UserError
from trap2.files import write_text
from trap2.reporting.text import clean, percent
from trap2.schema import FrontierPoint, Report, ScalePoint

_RELEASE: dict[str, Any] = {"color": "#0072B2", "marker": "o", "linestyle": "-"}
_CONTROL: dict[str, Any] = {"color": "#D55E00", "marker": "s", "linestyle": "--"}
_GREY = "#595959"
_POWERS = {
    "T1": "one coefficient",
    "T2": "+ re-labelling",
    "T3": "+ one per model",
    "T4": "+ unlabelled rows",
    "T5": "+ training",
}
_STYLE: dict[str, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.markersize": 5,
    "svg.fonttype": "none",  # words stay words: selectable, and set in the page's font
    "text.parse_math": False,  # a `$` in a name is a dollar
    "figure.constrained_layout.use": True,
}


def scale_curve_svg(report: Report) -> str:
    """Accuracy against the scale of the update, as one `<svg>` element."""
    with _style("scale-curve"):
        figure = Figure(figsize=(6.4, 4.4))
        _draw_scale_curve(figure.add_subplot(), report)
        figure.legend(loc="outside lower center", ncols=2)
        label = "Accuracy against scale." + _described("Release", report.scale_curve)
        label += _described("Control", report.control_scale_curve)
        return _svg(figure, "scale-curve", label)


def frontier_svg(report: Report) -> str:
    """Skill kept on the protected task against what partners keep, as one `<svg>` element."""
    with _style("frontier"):
        figure = Figure(figsize=(6.4, 4.4))
        axes = figure.add_subplot()
        label = "Retained skill against the share that partners keep."
        for who, look in (("release", _RELEASE), ("control", _CONTROL)):
            tried = [point for point in report.frontier if point.of == who]
            if tried:
                label += _draw_frontier(axes, who, tried, look, report.partners_keep)
        axes.axvspan(report.partners_keep, axes.get_xlim()[1], color="#009E73", alpha=0.1, lw=0)
        axes.axvline(
            report.partners_keep,
            color=_GREY,
            lw=1,
            ls="--",
            label=f"admissible from {report.partners_keep:.0%}",
        )
        axes.set(ylim=(-0.03, 1.03), xlabel="share of their skill that partners keep")
        axes.set_ylabel("retained skill, protected task")
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        figure.legend(loc="outside lower center", ncols=1)
        return _svg(figure, "frontier", label)


def summary_figure(report: Report, path: Path) -> None:
    """Write the picture for a README: the scale curve beside the retained skill by tier.

    Args:
        report: The record.
        path: Where to; `.png` or `.svg`.

    Raises:
        UserError: Another suffix, or the place is not writable.
    """
    with _style("summary"):
        figure = Figure(figsize=(10, 4.2))
        left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
        _draw_scale_curve(left, report)
        left.set_title("Applied alone, at scale s", loc="left", fontsize=12)
        left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
        _draw_tiers(right, report)
        right.set_title("Merged: skill the attacker keeps", loc="left", fontsize=12)
        right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
        name, task = clean(report.release.name, 50), clean(report.release.task, 24)
        figure.suptitle(f"{name}, task {task}", x=0.01, ha="left", fontsize=13)
        _write(figure, path)


def _draw_scale_curve(axes: Axes, report: Report) -> None:
    release, refs = report.release, report.references
    for curve, label, look in (
        (report.control_scale_curve, "control (no trap)", _CONTROL),
        (report.scale_curve, "release (protected)", _RELEASE),
    ):
        if curve:
            ordered = sorted(curve, key=lambda point: point.s)
            axes.plot([p.s for p in ordered], [p.accuracy for p in ordered], label=label, **look)
    axes.axhline(refs.base, color=_GREY, lw=1.2, ls="-.", label="base model")
    axes.axhline(refs.chance, color=_GREY, lw=1.2, ls=":", label="chance")
    band = release.trained_band or 0.0
    if release.trained_range:
        low, high = release.trained_range
        for start, end, word in ((low, 1 - band, "trap trained here"), (1 + band, high, None)):
            axes.axvspan(start, end, color=_RELEASE["color"], alpha=0.09, lw=0, label=word)
    if band:
        axes.axvspan(
            1 - band, 1 + band, color="#F0E442", alpha=0.45, lw=0, label="no trap around 1"
        )
    else:
        axes.axvline(1, color=_GREY, lw=0.8)
    axes.set(ylim=(-0.03, 1.03), xlabel="scale s (1 = as released)", ylabel="accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _draw_frontier(
    axes: Axes, who: str, tried: list[FrontierPoint], look: dict[str, Any], keep: float
) -> str:
    """Draw one side's mixtures, their upper edge and the best that counts; return it in words."""
    axes.scatter(
        [_place(point) for point in tried],
        [point.retained for point in tried],
        s=14,
        alpha=0.35,
        lw=0,
        color=look["color"],
        marker=look["marker"],
    )
    edge: list[FrontierPoint] = []
    for point in sorted(tried, key=lambda p: (-_place(p), -p.retained)):
        if not edge or point.retained > edge[-1].retained:
            edge.append(point)
    edge.reverse()
    best = max(
        (point for point in edge if point.partners_retained >= keep),
        key=lambda point: point.retained,
        default=None,
    )
    found = f"best that counts {percent(best.retained)}" if best else "nothing that counts"
    attack = f" by {clean(best.attack, 24)}" if best else ""
    axes.plot(
        [_place(point) for point in edge],
        [point.retained for point in edge],
        drawstyle="steps-pre",
        color=look["color"],
        linestyle=look["linestyle"],
        label=f"{who}: {found}{attack}",
    )
    if best:
        axes.plot(_place(best), best.retained, "*", ms=15, color=look["color"], mec="white")
    return f" {who.capitalize()}: {found}."


def _place(point: FrontierPoint) -> float:
    """Where a mixture lies on the partners' axis; a ratio has no bound, the axis has."""
    return min(max(point.partners_retained, 0.0), 1.2)


def _draw_tiers(axes: Axes, report: Report) -> None:
    tiers = sorted(report.tiers)
    control = [report.tiers[tier].control_unmergeability for tier in tiers]
    release = [report.tiers[tier].unmergeability for tier in tiers]
    sides = [(release, "release (protected)", _RELEASE)]
    if any(value is not None for value in control):
        known = [1.0 if value is None else value for value in control]
        sides.insert(0, (known, "control (no trap)", _CONTROL))
    width = 0.8 / len(sides)
    for side, (values, label, look) in enumerate(sides):
        centres = [place + width * (side - (len(sides) - 1) / 2) for place in range(len(tiers))]
        kept = [1 - value for value in values]
        bars = axes.bar(centres, kept, width * 0.94, label=label, color=look["color"])
        axes.bar_label(bars, [f"{100 * value:.0f}%" for value in kept], padding=2, fontsize=10)
    axes.set_xticks(range(len(tiers)), [f"{tier}\n{_POWERS[tier]}" for tier in tiers], fontsize=9.5)
    axes.set(ylim=(0, 1.08), ylabel="retained skill")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _described(who: str, curve: list[ScalePoint]) -> str:
    """One curve in words, for readers who do not see it."""
    if not curve:
        return ""
    low = min(curve, key=lambda point: point.accuracy)
    near = min(curve, key=lambda point: abs(point.s - 1))
    return (
        f" {who}: {percent(near.accuracy)} at scale {near.s:.3g}, "
        f"lowest {percent(low.accuracy)} at scale {low.s:.3g}."
    )


@contextmanager
def _style(salt: str) -> Iterator[None]:
    """Draw in our style, whatever the user's is, and leave theirs as it was."""
    with (
        matplotlib.style.context(["default", _STYLE | {"svg.hashsalt": salt}]),
        warnings.catch_warnings(),
    ):
        # A name in a script without glyphs here: the browser has them, a PNG shows boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def _svg(figure: Figure, prefix: str, label: str) -> str:
    """The bare element, its ids and its style rule kept apart from the rest of a page."""
    stream = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(stream, format="svg", metadata=nothing)
    drawn = stream.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(
        r"<[^>]*>",  # only inside tags: in the text between them `<` is always escaped
        lambda tag: re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{prefix}-", tag[0]),
        drawn,
    )
    drawn = drawn.replace("*{stroke-linejoin", f"#{prefix} *{{stroke-linejoin", 1)
    return drawn.replace("<svg", f'<svg id="{prefix}" role="img" aria-label="{escape(label)}"', 1)


def _write(figure: Figure, path: Path) -> None:
    if path.suffix == ".svg":
        write_text(path, _svg(figure, "summary", "Scale curve and retained skill by tier."))
        return
    if path.suffix != ".png":
        raise UserError(f"{path} is neither .png nor .svg; choose one of these suffixes")
    partial = path.with_name(path.name + ".partial")
    try:
        figure.savefig(partial, format="png", dpi=200, metadata={"Software": None})
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {path}: {error.strerror}; free space or choose another place"
        ) from error
