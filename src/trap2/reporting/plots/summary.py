"""The picture for a README: the scale curve beside the skill an attacker keeps, by tier."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from trap2.reporting.plots.canvas import INK, LOOKS, NAMES, Drawing, drawn
from trap2.reporting.plots.scale import draw_scale_curve
from trap2.reporting.words import clean, percent, retained_interval
from trap2.schema import Report

_POWERS = {
    "T1": "one\ncoefficient",
    "T2": "+ re-\nlabelling",
    "T3": "+ one\nper model",
    "T4": "+ rows,\nunlabelled",
    "T5": "+ training",
}


@drawn
def summary(report: Report) -> Drawing:
    """Accuracy against scale, and retained skill by tier, side by side."""
    figure = Figure(figsize=(10, 4.2))
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    draw_scale_curve(left, report, "accuracy")
    left.set_title("Applied alone, at scale s", loc="left", fontsize=12)
    _draw_tiers(right, report)
    right.set_title("Merged: skill the attacker keeps", loc="left", fontsize=12)
    for axes in (left, right):
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2)
    name, task = clean(report.release.name, 50), clean(report.release.task, 24)
    figure.suptitle(f"{name}, task {task}", x=0.01, ha="left", fontsize=13)
    kept = ", ".join(
        f"{t} {percent(1 - r.unmergeability)}" for t, r in sorted(report.tiers.items())
    )
    return Drawing("summary", figure, f"Audit of {name}", f"Retained skill by tier: {kept}.")


def _draw_tiers(axes: Axes, report: Report) -> None:
    tiers = sorted(report.tiers)
    results = [report.tiers[tier] for tier in tiers]
    sides = {"release": [(r.unmergeability, r.interval) for r in results]}
    if any(r.control_unmergeability is not None for r in results):
        control = [(r.control_unmergeability, r.control_interval) for r in results]
        sides = {"control": [(1.0 if u is None else u, span) for u, span in control], **sides}
    width = 0.8 / len(sides)
    for side, (who, values) in enumerate(sides.items()):
        centres = [place + width * (side - (len(sides) - 1) / 2) for place in range(len(tiers))]
        kept = [1 - value for value, _ in values]
        axes.bar(centres, kept, width * 0.94, label=NAMES[who], color=LOOKS[who]["color"])
        for centre, share, (_, unmergeability) in zip(centres, kept, values, strict=True):
            span = retained_interval(unmergeability)
            if span:
                axes.vlines(centre, *span, color=INK, lw=1.6)
            top = (centre, max(share, span[1] if span else 0.0))
            axes.annotate(
                f"{100 * share:.0f}%",
                top,
                (0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=10,
            )
    axes.set_xticks(range(len(tiers)), [f"{tier}\n{_POWERS[tier]}" for tier in tiers], fontsize=9.5)
    axes.set(ylim=(0, 1.08), ylabel="retained skill")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
