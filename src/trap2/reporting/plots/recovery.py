"""Attackers who train: what they reach by budget, with the release and without it."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from trap2.reporting.plots.canvas import LOOKS, SOFT, Drawing, drawn
from trap2.reporting.words import clean, percent
from trap2.schema import RecoveryPoint, Report

_SIDES: dict[str, tuple[str, dict[str, Any]]] = {
    "control": ("control_accuracy", LOOKS["control"]),
    "release": ("accuracy", LOOKS["release"]),
    "without the release": ("without_release", {"color": SOFT, "marker": "d", "linestyle": ":"}),
}
"""What is drawn of a point, and how."""


@drawn
def recovery(report: Report) -> Drawing | None:
    """Accuracy of merges against the training spent on them, method by method."""
    methods = list(dict.fromkeys(point.method for point in report.recovery))
    if not methods:
        return None
    figure = Figure(figsize=(9.6, 3.6))
    panels = figure.subplots(1, len(methods), sharey=True, squeeze=False)[0]
    for axes, method in zip(panels, methods, strict=True):
        _draw(axes, report, [point for point in report.recovery if point.method == method])
    panels[0].set(ylim=(-0.03, 1.03), ylabel="accuracy, protected task")
    panels[0].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    known = [dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True)) for axes in panels]
    entries = {label: handle for labels in known for label, handle in labels.items()}
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=4)
    words = [_described(report, method) for method in methods]
    return Drawing(
        "recovery", figure, "Accuracy of attackers who train, by budget", " ".join(words)
    )


def _draw(axes: Axes, report: Report, points: list[RecoveryPoint]) -> None:
    """One method: a line for each side and number of rows, hollow for the fewest."""
    fitted = not any(point.budget_steps for point in points)
    every = sorted({point.budget_rows for point in report.recovery})
    for who, (key, look) in _SIDES.items():
        for rows in [0] if fitted else every:
            line = [
                (point.budget_rows if fitted else point.budget_steps, getattr(point, key), point)
                for point in points
                if rows in (0, point.budget_rows) and getattr(point, key) is not None
            ]
            if not line:
                continue
            line.sort(key=lambda found: found[0])
            hollow = "none" if rows == every[0] and every[1:] else look["color"]
            places, values = [x for x, _, _ in line], [y for _, y, _ in line]
            axes.plot(places, values, label=who, markerfacecolor=hollow, **look)
            for x, y, point in line:
                if who == "release" and not point.admissible:
                    axes.annotate("*", (x, y), (4, 3), textcoords="offset points", color=SOFT)
    axes.axhline(report.references.standalone, color=SOFT, lw=0.8, ls="-.", label="release alone")
    reference = " (reference)" if points[0].reference else ""
    axes.set_title(clean(points[0].method, 24) + reference, loc="left", fontsize=11)
    axes.set_xlabel("labelled rows" if fitted else "training steps")
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.margins(x=0.12)


def _described(report: Report, method: str) -> str:
    """The dearest budget of a method in words."""
    points = [point for point in report.recovery if point.method == method]
    most = max(points, key=lambda point: (point.budget_rows, point.budget_steps))
    control = most.control_accuracy
    return (
        f"{clean(method, 24)}, {most.budget_rows} rows and {most.budget_steps} steps: "
        f"{percent(most.accuracy)}, {percent(most.without_release)} without the release"
        + (f", {percent(control)} with the control." if control is not None else ".")
    )
