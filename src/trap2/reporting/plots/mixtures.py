"""One coefficient per model: what was tried, what it kept, and what it cost the partners."""

from statistics import fmean
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from trap2.reporting.plots.canvas import GOOD, GROUND, LOOKS, NAMES, SOFT, Drawing, drawn
from trap2.reporting.words import clean, percent
from trap2.schema import FrontierPoint, Report

_MOST = 500
"""So many mixtures are drawn for each side, evenly chosen; a page of thousands would be slow."""

_STEPS = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
_SHADES = ListedColormap(colormaps["cividis"]([0.0, 0.25, 0.5, 0.75, 1.0]))


@drawn
def frontier(report: Report) -> Drawing | None:
    """Skill kept on the protected task against what partners keep."""
    sides = _sides(report)
    if not sides:
        return None
    figure = Figure(figsize=(5.2, 4.4))
    axes = figure.add_subplot()
    words = [_draw_frontier(axes, who, tried, report.partners_keep) for who, tried in sides.items()]
    keep = report.partners_keep
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, keep - 0.05), max(high, keep + 0.05))  # a few points fill no axis
    axes.axvspan(keep, axes.get_xlim()[1], color=GOOD, alpha=0.1, lw=0)
    axes.axvline(keep, color=SOFT, lw=1, ls="--", label=f"admissible from {keep:.0%}")
    axes.set(ylim=(-0.03, 1.03), xlabel="share of their skill that partners keep")
    axes.set_ylabel("retained skill, protected task")
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    figure.legend(loc="outside lower center", ncols=1)
    title = "Retained skill against the share that partners keep"
    return Drawing("frontier", figure, title, " ".join(words))


@drawn
def coefficients(report: Report) -> Drawing | None:
    """Where in the plane of coefficients the skill lives, and which mixtures count."""
    sides = {
        who: [point for point in tried if _coefficients(point)]
        for who, tried in _sides(report).items()
    }
    sides = {who: tried for who, tried in sides.items() if tried}
    if not sides:
        return None
    figure = Figure(figsize=(9.6, 3.9))
    panels = figure.subplots(1, len(sides), sharex=True, sharey=True, squeeze=False)[0]
    norm = BoundaryNorm(_STEPS, _SHADES.N)
    for axes, (who, tried) in zip(panels, sides.items(), strict=True):
        for counts, marker in ((False, "X"), (True, "o")):
            chosen = [
                p
                for p in _thinned(tried)
                if (p.partners_retained >= report.partners_keep) is counts
            ]
            places = [_coefficients(point) or (0.0, 0.0) for point in chosen]
            axes.scatter(
                [own for own, _ in places],
                [partners for _, partners in places],
                c=[point.retained for point in chosen],
                cmap=_SHADES,
                norm=norm,
                marker=marker,
                s=80,
                lw=0.8,
                edgecolors=SOFT,
                label="admissible" if counts else "partners lose too much",
            )
        axes.set_title(NAMES[who], loc="left", fontsize=12)
        axes.set_xlabel("its own coefficient")
        axes.grid(axis="both")
    panels[0].set_ylabel("partners' coefficient (mean)")
    bar = figure.colorbar(ScalarMappable(norm, _SHADES), ax=panels, label="retained skill")
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    words = [_described(who, tried, report.partners_keep) for who, tried in sides.items()]
    return Drawing("coefficients", figure, "Retained skill by coefficients", " ".join(words))


def _sides(report: Report) -> dict[str, list[FrontierPoint]]:
    sides = {who: [p for p in report.frontier if p.of == who] for who in ("control", "release")}
    return {who: tried for who, tried in sides.items() if tried}


def _thinned(tried: list[FrontierPoint]) -> list[FrontierPoint]:
    return tried[:: -(-len(tried) // _MOST)]


def _coefficients(point: FrontierPoint) -> tuple[float, float] | None:
    """The own coefficient and the partners' mean; None if the record does not tell them apart."""
    values = {k: float(v) for k, v in point.params.items() if isinstance(v, int | float)}
    if point.of not in values or len(values) < 2:
        return None
    return values.pop(point.of), fmean(values.values())


def _draw_frontier(axes: Axes, who: str, tried: list[FrontierPoint], keep: float) -> str:
    """Draw one side's mixtures, their upper edge and the best that counts; return it in words."""
    look: dict[str, Any] = LOOKS[who]
    axes.scatter(
        [_place(point) for point in _thinned(tried)],
        [point.retained for point in _thinned(tried)],
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
    best = _best(edge, keep)
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
        axes.plot(_place(best), best.retained, "*", ms=15, color=look["color"], mec=GROUND)
    return f"{who.capitalize()}: {found}."


def _best(tried: list[FrontierPoint], keep: float) -> FrontierPoint | None:
    counting = [point for point in tried if point.partners_retained >= keep]
    return max(counting, key=lambda point: point.retained, default=None)


def _described(who: str, tried: list[FrontierPoint], keep: float) -> str:
    best = _best(tried, keep)
    place = _coefficients(best) if best else None
    if best is None or place is None:
        return f"{who.capitalize()}: no mixture counts."
    return (
        f"{who.capitalize()}: the best mixture that counts keeps {percent(best.retained)}, with "
        f"its own coefficient at {place[0]:.3g} and the partners' at {place[1]:.3g}."
    )


def _place(point: FrontierPoint) -> float:
    """Where a mixture lies on the partners' axis; a ratio has no bound, the axis has."""
    return min(max(point.partners_retained, 0.0), 1.2)
