"""From numbers to words: retained skill, unmergeability, and the sentence a person would say.

Symbols (docs/method.md): a0 base, a1 standalone, m merged accuracy; R = clip((m-a0)/(a1-a0), 0, 1).
"""

from collections.abc import Sequence
from typing import Literal

from trap2.schema import AttackResult, References, Tier, TierResult

HOLDS, BROKEN = 0.8, 0.2
"""Unmergeability from which a tier holds, and under which it is broken; between, it leaks."""

MERGEABLE = 0.3
"""If the control's unmergeability is above 1 - this, there was nothing to protect."""

TIERS: tuple[Tier, ...] = ("T1", "T2", "T3", "T4", "T5")

Word = Literal["holds", "leaks", "broken", "nothing to protect"]


def retained_skill(merged: float, base: float, standalone: float) -> float:
    """R: share of the skill above the base that a merge keeps; 0 when there is no skill."""
    if standalone <= base:
        return 0.0
    return min(1.0, max(0.0, (merged - base) / (standalone - base)))


def tier_results(attacks: list[AttackResult], references: References) -> dict[Tier, TierResult]:
    """The worst case of each tier, every tier including the ones before it."""
    has_control = references.control is not None
    results: dict[Tier, TierResult] = {}
    for place, tier in enumerate(TIERS):
        mine = [a for a in attacks if a.tier in TIERS[: place + 1]]
        if not any(a.tier == tier for a in attacks):
            continue
        worst = max(mine, key=lambda a: a.retained)
        control = 1 - max(a.control_retained or 0.0 for a in mine) if has_control else None
        unmergeability = 1 - worst.retained
        own = [a for a in attacks if a.tier == tier]
        results[tier] = TierResult(
            unmergeability=unmergeability,
            worst_attack=worst.name,
            control_unmergeability=control,
            partners_ignored=max(a.unconstrained_retained for a in mine),
            by_rows=_by_rows(own, control=False),
            control_by_rows=_by_rows(own, control=True) if has_control else {},
            verdict=word(unmergeability, control, has_skill(references)),
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


def word(unmergeability: float, control: float | None, skill: bool) -> Word:
    """One tier in one word.

    Args:
        unmergeability: U of the release.
        control: U of its control, None where there is none.
        skill: Whether the release does better than its base: a merge keeps no skill of none.
    """
    if not skill or (control is not None and control > 1 - MERGEABLE):
        return "nothing to protect"
    if unmergeability >= HOLDS:
        return "holds"
    return "broken" if unmergeability < BROKEN else "leaks"


MEANS: dict[Tier, str] = {
    "T1": "a merge with one tuned coefficient",
    "T2": "the same with its outputs re-labelled from a few labelled rows",
    "T3": "a merge with one tuned coefficient per model, re-labelled",
    "T4": "a merge that looks at unlabelled rows, re-labelled",
    "T5": "a merge by an attacker who trains on labelled rows",
}


def sentence(
    references: References, utility_cost: float | None, tiers: dict[Tier, TierResult]
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
        if result.control_unmergeability is not None:
            kept += f" (of the control's: {100 * (1 - result.control_unmergeability):.0f} %)"
        free = round(100 * (result.partners_ignored or 0.0))
        if free > share:
            kept += f", and {free} % if the partners do not matter"
        parts.append(f"{tier} {result.verdict}: {MEANS[tier]} {kept}")
    return ". ".join(parts) + "."


LIMITS = [
    "Only the merging methods, partners and budgets listed here were tried; a stronger attacker "
    "may do better.",
    "An attacker who keeps this release at coefficient 1 and shrinks the partners keeps its skill; "
    "what that costs the partners is tier T3 and its frontier.",
    "Routing between whole models, switching adapters and averaging outputs leave a release at its "
    "own scale 1; no weight-space protection hinders them.",
    "One training seed and one set of partners; differences of a few points may be chance.",
]
"""What every report says it does not claim."""

UNTESTED = {
    "distil": "Distilling the release into another model is not merging and was not tested here.",
    "finetune_before": "Fine-tuning the release before merging it was not tested here.",
    "finetune_after": "Fine-tuning the merged model was not tested here.",
}
"""What a report says of each way to train (`attacker.recovery`) that was not tried."""


def limits(tried: Sequence[str]) -> list[str]:
    """What a report says it does not claim, given the ways to train that were tried."""
    return [*LIMITS, *(said for method, said in UNTESTED.items() if method not in tried)]
