"""From numbers to words: retained skill, unmergeability, and the sentence a person would say.

Symbols (docs/method.md): a0 base, a1 standalone, m merged accuracy; R = clip((m-a0)/(a1-a0), 0, 1).
"""

from collections.abc import Mapping, Sequence

from trap2.schema import (
    AttackResult,
    Interval,
    References,
    Report,
    Thresholds,
    Tier,
    TierResult,
    Word,
)

TIERS: tuple[Tier, ...] = ("T1", "T2", "T3", "T4", "T5")

STANDARD = Thresholds()
"""The words as they are, unless an audit says otherwise."""

Spread = tuple[Interval, Interval | None]
"""The intervals of unmergeability of release and control."""


def retained_skill(merged: float, base: float, standalone: float) -> float:
    """R: share of the skill above the base that a merge keeps; 0 when there is no skill."""
    if standalone <= base:
        return 0.0
    return min(1.0, max(0.0, (merged - base) / (standalone - base)))


def tier_results(
    attacks: list[AttackResult],
    references: References,
    thresholds: Thresholds = STANDARD,
    spreads: Mapping[Tier, Spread] | None = None,
) -> dict[Tier, TierResult]:
    """The worst case of each tier, every tier including the ones before it.

    A tier without an interval has the word of its number, and of the lowest end of the intervals
    before it: its own could not begin above that.

    Args:
        attacks: What every attack reached.
        references: What they are measured against.
        thresholds: Where the words begin.
        spreads: The intervals of each tier; without them the words are of the numbers themselves.
    """
    has_control = references.control is not None
    results: dict[Tier, TierResult] = {}
    lowest = 1.0
    for place, tier in enumerate(TIERS):
        mine = [a for a in attacks if a.tier in TIERS[: place + 1]]
        if not any(a.tier == tier for a in attacks):
            continue
        worst = max(mine, key=lambda a: a.retained)
        control = 1 - max(a.control_retained or 0.0 for a in mine) if has_control else None
        unmergeability = 1 - worst.retained
        own = [a for a in attacks if a.tier == tier]
        interval, control_interval = (spreads or {}).get(tier, (None, None))
        lowest = min(lowest, interval[0] if interval else unmergeability)
        results[tier] = TierResult(
            unmergeability=unmergeability,
            worst_attack=worst.name,
            control_unmergeability=control,
            partners_ignored=max(a.unconstrained_retained for a in mine),
            by_rows=_by_rows(own, control=False),
            control_by_rows=_by_rows(own, control=True) if has_control else {},
            verdict=word(
                interval or (lowest, unmergeability),
                control,
                has_skill(references),
                thresholds,
            ),
            interval=interval,
            control_interval=control_interval,
        )
    return results


def _by_rows(attacks: list[AttackResult], control: bool) -> dict[str, float]:
    """Unmergeability for each number of labelled rows, this tier alone."""
    found: dict[str, float] = {}
    for rows in dict.fromkeys(a.relabel_rows for a in attacks):
        kept = [
            (a.control_retained or 0.0) if control else a.retained
            for a in attacks
            if a.relabel_rows == rows
        ]
        found[str(rows)] = 1 - max(kept)
    return found


def has_skill(references: References) -> bool:
    """Whether the release, as released, does better than its base."""
    return references.standalone > references.base


def word(interval: Interval, control: float | None, skill: bool, thresholds: Thresholds) -> Word:
    """One tier in one word, which both ends of the interval must agree on.

    Args:
        interval: The interval of U of the release.
        control: U of its control, None where there is none.
        skill: Whether the release does better than its base: a merge keeps no skill of none.
        thresholds: Where the words begin.
    """
    if not skill or (control is not None and control > 1 - thresholds.mergeable):
        return "nothing to protect"
    low, high = (_certain(end, thresholds) for end in interval)
    return low if low == high else "inconclusive"


def _certain(unmergeability: float, thresholds: Thresholds) -> Word:
    if unmergeability >= thresholds.holds:
        return "holds"
    return "broken" if unmergeability < thresholds.broken else "leaks"


def unmet(report: Report, required: Mapping[Tier, float]) -> list[str]:
    """Which tiers do not hold what was required of them, and why; a certain end is what counts.

    Args:
        report: The record.
        required: By tier, the least that the lower end of its interval of unmergeability may be.
    """
    found = []
    for tier, needed in required.items():
        result = report.tiers.get(tier)
        if result is None:
            found.append(f"{tier} was not tested, {needed:g} is required")
        elif result.verdict == "nothing to protect":
            found.append(f"{tier} has nothing to protect, {needed:g} is required")
        else:
            low, _ = result.interval or (result.unmergeability,) * 2
            if low < needed:
                end = (
                    f"lower end of its 95 % interval {low:.3f}"
                    if result.interval
                    else "no interval"
                )
                found.append(
                    f"{tier} has unmergeability {result.unmergeability:.3f}, {end}, "
                    f"{needed:g} is required"
                )
    return found


MEANS: dict[Tier, str] = {
    "T1": "a merge with one tuned coefficient",
    "T2": "the same with its outputs re-labelled from a few labelled rows",
    "T3": "a merge with one tuned coefficient per model",
    "T4": "a merge that looks at unlabelled rows, re-labelled",
    "T5": "a merge by an attacker who trains on labelled rows",
}


def sentence(
    references: References,
    utility_cost: float | None,
    tiers: dict[Tier, TierResult],
    thresholds: Thresholds = STANDARD,
) -> str:
    """The verdict as a person would say it: first whether it works, then what a merge keeps."""
    parts = [f"As released it reaches {100 * references.standalone:.1f} %"]
    if not has_skill(references):
        parts[0] += f" and has no skill above its base ({100 * references.base:.1f} %)"
    if references.control is not None and utility_cost is not None:
        parts[0] += (
            f" where its unprotected control reaches {100 * references.control:.1f} %"
            f" (utility cost {100 * utility_cost:+.1f} points)"
        )
    for tier, result in tiers.items():
        share = round(100 * (1 - result.unmergeability))
        kept = f"keeps {share} % of the skill"
        if result.interval is not None:
            least, most = (round(100 * (1 - end)) for end in reversed(result.interval))
            kept += f" (95 % interval {least} to {most} %)"
        if result.control_unmergeability is not None:
            kept += f", of the control's {100 * (1 - result.control_unmergeability):.0f} %"
        free = round(100 * (result.partners_ignored or 0.0))
        if free > share:
            kept += f", and {free} % if the partners do not matter"
        means = MEANS[tier] + (", re-labelled" if tier == "T3" and _read(result) else "")
        parts.append(f"{tier} {result.verdict}: {means} {kept}")
    if tiers:
        parts.append(
            "Words are of the whole interval: holds from an unmergeability of "
            f"{100 * thresholds.holds:.0f} % up, broken under {100 * thresholds.broken:.0f} %, "
            "leaks between, inconclusive across"
        )
    return ". ".join(parts) + "."


def _read(result: TierResult) -> bool:
    """Whether some of a tier's results were re-labelled."""
    return any(rows != "0" for rows in result.by_rows)


LIMITS = [
    "Only the merging methods, partners and budgets listed here were tried; a stronger attacker "
    "may do better.",
    "An attacker who keeps this release at coefficient 1 and shrinks the partners keeps its skill; "
    "what that costs the partners is tier T3 and its frontier.",
    "Routing between whole models, switching adapters and averaging outputs leave a release at its "
    "own scale 1; no weight-space protection hinders them.",
    "Intervals say what another draw of test rows might give, not what other training seeds, "
    "partners or validation rows might.",
    "One training seed and one set of partners; differences of a few points may be chance.",
]
"""What every report says it does not claim."""

NOT_RELABELLED = (
    "Re-labelling (T2) reads class outputs, and a task of kind {kind} has none: T1 and T3 are of "
    "the answers as they come, which flatters a release whose answers are moved and not hidden."
)
"""What a report says where T2 is left out."""

UNTESTED = {
    "distil": "Distilling the release into another model is not merging and was not tested here.",
    "finetune_before": "Fine-tuning the release before merging it was not tested here.",
    "finetune_after": "Fine-tuning the merged model was not tested here.",
}
"""What a report says of each way to train (`attacker.recovery`) that was not tried."""


def limits(tried: Sequence[str], unread: str = "") -> list[str]:
    """What a report says it does not claim.

    Args:
        tried: The ways to train that were tried.
        unread: The kind of task, if it gives no class outputs to re-label.
    """
    blind = [NOT_RELABELLED.format(kind=unread)] if unread else []
    return [*blind, *LIMITS, *(said for method, said in UNTESTED.items() if method not in tried)]
