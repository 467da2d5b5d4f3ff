"""The update applied alone, at scale s: accuracy and loss of release and control."""

from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from trap2.reporting.plots.canvas import FREE, LOOKS, NAMES, RELEASE, SOFT, Drawing, drawn
from trap2.reporting.words import percent
from trap2.schema import Report, ScalePoint


@drawn
def accuracy(report: Report) -> Drawing | None:
    """Accuracy against the scale of the update."""
    return _drawing(report, "accuracy")


@drawn
def loss(report: Report) -> Drawing | None:
    """Loss against the scale of the update."""
    return _drawing(report, "loss")


def draw_scale_curve(axes: Axes, report: Report, of: Literal["accuracy", "loss"]) -> None:
    """Draw both curves and where the trap was trained.

    Args:
        axes: Where to.
        report: The record.
        of: What is drawn against the scale.
    """
    for who, curve in _curves(report).items():
        points = sorted(curve, key=lambda point: point.s)
        values = [getattr(point, of) for point in points]
        axes.plot([p.s for p in points], values, label=NAMES[who], **LOOKS[who])
    if of == "accuracy":
        refs = report.references
        axes.axhline(refs.base, color=SOFT, lw=1.2, ls="-.", label="base model")
        axes.axhline(refs.chance, color=SOFT, lw=1.2, ls=":", label="chance")
        axes.set(ylim=(-0.03, 1.03))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    else:
        axes.set_ylim(0, 1.08 * max(p.loss for c in _curves(report).values() for p in c))
    _draw_trained(axes, report)
    axes.set(xlabel="scale s (1 = as released)", ylabel=of)


def _draw_trained(axes: Axes, report: Report) -> None:
    release = report.release
    band = release.trained_band or 0.0
    if release.trained_range:
        low, high = release.trained_range
        for start, end, word in ((low, 1 - band, "trap trained here"), (1 + band, high, None)):
            axes.axvspan(start, end, color=RELEASE["color"], alpha=0.09, lw=0, label=word)
    if band:
        axes.axvspan(1 - band, 1 + band, color=FREE, alpha=0.45, lw=0, label="no trap around 1")
    else:
        axes.axvline(1, color=SOFT, lw=0.8)


def _drawing(report: Report, of: Literal["accuracy", "loss"]) -> Drawing | None:
    curves = _curves(report)
    if not curves:
        return None
    figure = Figure(figsize=(5.2, 4.2))
    draw_scale_curve(figure.add_subplot(), report, of)
    figure.legend(loc="outside lower center", ncols=2)
    words = [_described(NAMES[who], curve, of) for who, curve in curves.items()]
    return Drawing(of, figure, f"{of.capitalize()} against scale", " ".join(words))


def _curves(report: Report) -> dict[str, list[ScalePoint]]:
    curves = {"control": report.control_scale_curve, "release": report.scale_curve}
    return {who: curve for who, curve in curves.items() if curve}


def _described(who: str, curve: list[ScalePoint], of: Literal["accuracy", "loss"]) -> str:
    worst = (min if of == "accuracy" else max)(curve, key=lambda point: getattr(point, of))
    near = min(curve, key=lambda point: abs(point.s - 1))
    say = percent if of == "accuracy" else "{:.2f}".format
    return (
        f"{who.capitalize()}: {say(getattr(near, of))} at scale {near.s:.3g}, "
        f"{'lowest' if of == 'accuracy' else 'highest'} {say(getattr(worst, of))} "
        f"at scale {worst.s:.3g}."
    )
