"""Several audits side by side: which release is hardest to merge, and at what cost."""

import json
from collections.abc import Sequence

from trap2.reporting.tables import Table
from trap2.reporting.words import NONE, clean, percent, points
from trap2.schema import Report, Tier, TierResult


def leaderboard(reports: Sequence[tuple[str, Report]]) -> Table:
    """One row per report, the most unmergeable of each setting first.

    Args:
        reports: Where each was read from, and the record.
    """
    settings = {key: n for n, key in enumerate(dict.fromkeys(_setting(r) for _, r in reports), 1)}
    ranked = sorted(reports, key=lambda entry: (settings[_setting(entry[1])], *_rank(entry[1])))
    tiers = sorted(dict.fromkeys(tier for _, report in reports for tier in report.tiers))
    headers = ("release", "task", "setting", "seed", "alone", "utility cost")
    return Table(
        "Unmergeability, in brackets the control's",
        (*headers, *tiers, "verdict", "flags", "report"),
        tuple(_row(place, report, settings[_setting(report)], tiers) for place, report in ranked),
        ("release", "task", "verdict", "flags", "report"),
        "Only rows of one setting compare: the same base, task, partners, rows and attacker. "
        "Unmergeability is that of the worst attack of a tier and of the tiers before it.",
    )


def _rank(report: Report) -> tuple[float, float]:
    worst = min((result.unmergeability for result in report.tiers.values()), default=0.0)
    return -worst, report.utility_cost or 0.0


def _setting(report: Report) -> str:
    """What must be the same for two audits to be compared."""
    release = report.release
    return json.dumps(
        [
            report.digests.get("base"),
            release.task,
            release.classes,
            sorted(release.partners),
            {key: rows for key, rows in report.rows.items() if key != "evaluations"},
            report.settings,
        ],
        sort_keys=True,
        default=str,
    )


def _row(place: str, report: Report, setting: int, tiers: Sequence[Tier]) -> tuple[str, ...]:
    results = [report.tiers.get(tier) for tier in tiers]
    return (
        clean(report.release.name),
        clean(report.release.task, 24),
        str(setting),
        str(report.seed),
        percent(report.references.standalone),
        points(report.utility_cost, report.utility_cost_interval),
        *map(_cell, results),
        ", ".join(result.verdict for result in results if result) or NONE,
        " ".join(clean(flag.code, 9) for flag in report.flags) or NONE,
        clean(place),
    )


def _cell(result: TierResult | None) -> str:
    if result is None:
        return NONE
    own = percent(result.unmergeability, result.interval)
    return f"{own} [{percent(result.control_unmergeability)}]"
