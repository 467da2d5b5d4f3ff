"""Several audits of one recipe under different seeds, for a terminal."""

from trap2.reporting.tables import Table
from trap2.reporting.text import aligned
from trap2.reporting.words import clean, percent
from trap2.schema import Combined, OverSeeds


def render(combined: Combined, width: int = 100) -> str:
    """The record in tables, tiers first.

    Args:
        combined: The record.
        width: Most characters in a line.
    """
    tables = [tier_table(combined), reference_table(combined)]
    if combined.flags:
        tables.append(flag_table(combined))
    return "\n\n".join(aligned(table, width) for table in tables) + "\n"


def tier_table(combined: Combined) -> Table:
    """Unmergeability of release and control over seeds, tier by tier."""
    release = combined.release
    return Table(
        f"Unmergeability of {clean(release.task, 24)} ({release.kind}) over {len(combined.seeds)} "
        "training seeds",
        ("tier", "release", "control", "by seed", "verdict"),
        tuple(
            (
                tier,
                _mean(result.unmergeability),
                _mean(result.control_unmergeability),
                ", ".join(map(percent, result.unmergeability.values)),
                result.verdict,
            )
            for tier, result in sorted(combined.tiers.items())
        ),
        ("tier", "by seed", "verdict"),
        "mean over seeds, in brackets its 95 % interval",
    )


def reference_table(combined: Combined) -> Table:
    """What it costs, nothing merged."""
    named = {
        "base": combined.base,
        "control": combined.control,
        "standalone": combined.standalone,
        "utility cost": combined.utility_cost,
    }
    return Table(
        "Accuracy on test rows, nothing merged; utility cost = control - standalone",
        ("what", "mean", "deviation", "by seed"),
        tuple(
            (name, _mean(over), percent(over.deviation), ", ".join(map(percent, over.values)))
            for name, over in named.items()
            if over is not None
        ),
        ("what", "by seed"),
        f"seeds: {', '.join(clean(seed, 12) for seed in combined.seeds)}",
    )


def flag_table(combined: Combined) -> Table:
    """The reasons to doubt it, by code."""
    headers = ("flag", "raised because", "here")
    return Table(
        "Reasons to doubt these audits",
        headers,
        tuple((clean(f.code, 9), clean(f.title), clean(f.detail, 1000)) for f in combined.flags),
        headers,
        "docs/flags.md says what each one means and what to do",
    )


def _mean(over: OverSeeds | None) -> str:
    if over is None:
        return percent(None)
    low, high = (f"{100 * end:.1f}" for end in over.interval)
    return f"{percent(over.mean)} [{low}, {high}]"
