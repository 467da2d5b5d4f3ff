"""What merges kept: every attack by tier, and raw accuracy against re-labelled accuracy."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from trap2.reporting.plots.canvas import INK, LOOKS, NAMES, SOFT, Drawing, drawn
from trap2.reporting.words import clean, percent, retained_interval
from trap2.schema import AttackResult, Interval, Report, Tier

_ANY = "any attack up to this tier"
Kept = tuple[float, Interval | None, bool]
"""Retained skill, its interval, and whether the merge counts."""


@drawn
def attacks(report: Report) -> Drawing | None:
    """Retained skill by attack and tier, control beside release, with intervals."""
    names = list(dict.fromkeys(attack.name for attack in report.attacks))
    if not names or not report.tiers:
        return None
    tiers = sorted(report.tiers)
    figure = Figure(figsize=(9.6, 1.7 + 0.36 * (len(names) + 1)))
    panels = figure.subplots(1, len(tiers), sharex=True, sharey=True, squeeze=False)[0]
    for axes, tier in zip(panels, tiers, strict=True):
        _draw_tier(axes, report, tier, names)
    panels[0].set_yticks(range(len(names) + 1), [_ANY, *(clean(name, 24) for name in names)])
    panels[0].set(ylim=(len(names) + 0.6, -0.6), xlim=(0, 1.08))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    words = [
        f"{tier}: release {percent(1 - result.unmergeability)}"
        + (
            f", control {percent(1 - result.control_unmergeability)}."
            if result.control_unmergeability is not None
            else "."
        )
        for tier, result in sorted(report.tiers.items())
    ]
    title = "Retained skill by attack and tier"
    return Drawing("attacks", figure, title, "The most that any attack keeps. " + " ".join(words))


@drawn
def relabelling(report: Report) -> Drawing | None:
    """Accuracy of merges with one coefficient, as they answer and after re-labelling."""
    raw = {attack.name: attack for attack in report.attacks if attack.tier == "T1"}
    read = [a for a in report.attacks if a.tier == "T2" and a.name in raw]
    if not read:
        return None
    figure = Figure(figsize=(5.2, 4.6))
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color=SOFT, lw=1, ls=":", label="re-labelling changes nothing")
    few = min(attack.relabel_rows for attack in read)
    for who in ("control", "release"):
        for rows in sorted({attack.relabel_rows for attack in read}):
            pairs = [
                (_merged(raw[a.name], who), _merged(a, who)) for a in read if a.relabel_rows == rows
            ]
            known = [(x, y) for x, y in pairs if x is not None and y is not None]
            if known:
                color = LOOKS[who]["color"]
                axes.scatter(
                    [x for x, _ in known],
                    [y for _, y in known],
                    s=34,
                    alpha=0.8,
                    marker=LOOKS[who]["marker"],
                    edgecolors=color,
                    facecolors="none" if rows == few else color,
                    label=f"{who} merged, {rows} rows",
                )
    _draw_references(axes, report)
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    axes.set(xlabel="accuracy as the merge answers", ylabel="accuracy re-labelled")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    figure.legend(loc="outside lower center", ncols=2)
    best = max(read, key=lambda attack: attack.merged)
    words = (
        f"The most accurate re-labelled merge of the release reaches {percent(best.merged)} with "
        f"{best.relabel_rows} rows, from {percent(raw[best.name].merged)} as it answers."
    )
    return Drawing("relabelling", figure, "Raw against re-labelled accuracy", words)


def _draw_tier(axes: Axes, report: Report, tier: Tier, names: list[str]) -> None:
    result = report.tiers[tier]
    control = result.control_unmergeability
    sides: dict[str, dict[int, Kept]] = {"control": {}, "release": {}}
    sides["release"][0] = (1 - result.unmergeability, retained_interval(result.interval), True)
    if control is not None:
        sides["control"][0] = (1 - control, retained_interval(result.control_interval), True)
    for place, name in enumerate(names, start=1):
        own = [a for a in report.attacks if a.name == name and a.tier == tier]
        for who, side in sides.items():
            found = [kept for kept in (_kept(attack, who) for attack in own) if kept]
            if found:
                side[place] = max(found, key=lambda kept: kept[0])
    for shift, (who, side) in zip((-0.2, 0.2), sides.items(), strict=True):
        if not side:
            continue
        places = [n + shift for n in side]
        kept = [value for value, _, _ in side.values()]
        axes.barh(places, kept, 0.38, color=LOOKS[who]["color"], label=NAMES[who])
        for y, (value, interval, counts) in zip(places, side.values(), strict=True):
            if interval:
                axes.hlines(y, *interval, color=INK, lw=1.6)
            if not counts:
                end = max(value, interval[1] if interval else 0.0)
                axes.text(end + 0.01, y + 0.12, "*", va="center", color=SOFT)
    axes.axhline(0.5, color=SOFT, lw=0.8)
    axes.set_title(tier, loc="left", fontsize=12)
    axes.set_xlabel("retained skill")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")


def _kept(attack: AttackResult, who: str) -> Kept | None:
    if who == "release":
        return attack.retained, attack.interval, attack.admissible
    if attack.control_retained is None:
        return None
    return (
        attack.control_retained,
        attack.control_interval,
        attack.control_admissible is not False,
    )


def _merged(attack: AttackResult, who: str) -> float | None:
    return attack.merged if who == "release" else attack.control_merged


def _draw_references(axes: Axes, report: Report) -> None:
    """The base model and both updates alone, read with the most labelled rows."""
    refs = report.references
    if not refs.relabelled:
        return
    most = max(refs.relabelled, key=lambda read: read.rows)
    for x, y, marker, color, label in (
        (refs.base, most.base, "X", SOFT, "base model"),
        (refs.control, most.control, "*", LOOKS["control"]["color"], "control alone"),
        (refs.standalone, most.standalone, "*", LOOKS["release"]["color"], "release alone"),
    ):
        if x is not None and y is not None:
            axes.scatter([x], [y], s=130, marker=marker, color=color, lw=0, label=label)
