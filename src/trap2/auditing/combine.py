"""`trap2 combine`: audits of one recipe under different training seeds, as one record.

Symbols: n seeds; the interval of a mean over them is `mean -+ t * deviation / sqrt(n)`, t the
97.5 % quantile of Student's distribution with n - 1 degrees of freedom. All audits are scored on
one task, and what its test rows leave open does not average out over seeds: the interval is never
narrower than the mean of the audits' own.
"""

import math
from collections.abc import Iterator, Sequence
from statistics import fmean, stdev

from scipy.stats import t as student

from trap2.auditing.verdict import word
from trap2.errors import UserError
from trap2.schema import Combined, CombinedTier, Flag, OverSeeds, Report, Tier

Named = tuple[str, Report]
"""Where a report comes from, and the report."""

SEEDS = ("seed", "trap2.scale_seed")
"""Keys of a recipe in which the audits shall differ."""

CODE, TITLE = "T014", "results differ by seed more than by defence"


def combine(reports: Sequence[Named]) -> Combined:
    """One record of several audits.

    Args:
        reports: Where each comes from, and the report.

    Raises:
        UserError: Fewer than two, one without a recipe, two of one seed, or they differ in more
            than the seed.
    """
    _check(reports)
    audits = [report for _, report in reports]
    first = audits[0]
    recipe = {key: value for key, value in first.release.recipe.items() if key not in SEEDS}
    tiers = {tier: _tier(audits, tier) for tier in first.tiers}
    return Combined(
        release=first.release.model_copy(update={"recipe": recipe}),
        seeds=[audit.release.recipe["seed"] for audit in audits],
        base=_over([audit.references.base for audit in audits]),
        standalone=_over([audit.references.standalone for audit in audits]),
        control=_maybe([audit.references.control for audit in audits]),
        utility_cost=_maybe(
            [audit.utility_cost for audit in audits],
            [audit.utility_cost_interval for audit in audits],
            bounds=(-1.0, 1.0),
        ),
        tiers=tiers,
        thresholds=first.thresholds,
        flags=[*_flags(audits), *_differ_by_seed(tiers)],
        settings=first.settings,
        rows={split: first.rows[split] for split in ("validation", "test")},
        digests=[audit.digests for audit in audits],
    )


def _check(reports: Sequence[Named]) -> None:
    """Refuse what cannot be averaged."""
    if len(reports) < 2:
        raise UserError(f"{len(reports)} report cannot be combined; give one for each seed")
    seen: dict[str, str] = {}
    for path, report in reports:
        seed = report.release.recipe.get("seed")
        if seed is None:
            raise UserError(
                f"{path} does not say by which recipe and seed its release was trained; audit a "
                "release with its trap2.json again"
            )
        if seed in seen:
            raise UserError(f"{path} is of seed {seed}, as {seen[seed]} is; give one for each seed")
        seen[seed] = path
    (origin, first), *others = reports
    for path, other in others:
        found = [*_differences(first, other)]
        if found:
            more = f" and {len(found) - 3} more" if found[3:] else ""
            raise UserError(
                f"{path} and {origin} differ in {', '.join(found[:3])}{more}; combine audits of "
                "one recipe that differ in the training seed alone"
            )


def _differences(first: Report, other: Report) -> Iterator[str]:
    """Keys in which two audits differ that should not."""
    ours, theirs = _setup(first), _setup(other)
    for key in {**ours, **theirs}:
        if ours.get(key) != theirs.get(key):
            yield " ".join(key.split())  # a stranger's key stays in its line


def _setup(report: Report) -> dict[str, object]:
    release = report.release.model_dump(exclude={"name", "base", "recipe"})
    recipe = report.release.recipe
    return {
        **release,
        "base": report.digests.get("base"),
        **{f"recipe.{k}": v for k, v in recipe.items() if k not in (*SEEDS, "base")},
        **{f"attacker.{k}": v for k, v in report.settings.items()},
        "validation rows": report.rows["validation"],
        "test rows": report.rows["test"],
        "partners_keep": report.partners_keep,
        "thresholds": report.thresholds,
        "tiers": [*report.tiers],
    }


def _tier(audits: Sequence[Report], tier: Tier) -> CombinedTier:
    results = [audit.tiers[tier] for audit in audits]
    unmergeability = _over(
        [result.unmergeability for result in results], [result.interval for result in results]
    )
    control = _maybe(
        [result.control_unmergeability for result in results],
        [result.control_interval for result in results],
    )
    skill = fmean(audit.references.standalone - audit.references.base for audit in audits) > 0
    return CombinedTier(
        unmergeability=unmergeability,
        control_unmergeability=control,
        verdict=word(
            unmergeability.interval,
            control.mean if control else None,
            skill,
            audits[0].thresholds,
        ),
        verdicts=[result.verdict for result in results],
    )


def _maybe(
    values: Sequence[float | None],
    intervals: Sequence[tuple[float, float] | None] = (),
    bounds: tuple[float, float] = (0.0, 1.0),
) -> OverSeeds | None:
    """Over seeds, or None where one of them has no such number."""
    known = [value for value in values if value is not None]
    return _over(known, intervals, bounds) if len(known) == len(values) else None


def _over(
    values: Sequence[float],
    intervals: Sequence[tuple[float, float] | None] = (),
    bounds: tuple[float, float] = (0.0, 1.0),
) -> OverSeeds:
    mean, deviation = fmean(values), stdev(values)
    half = float(student.ppf(0.975, len(values) - 1)) * deviation / math.sqrt(len(values))
    low, high = mean - half, mean + half
    own = [interval for interval in intervals if interval is not None]
    if own:
        low, high = min(low, fmean(o[0] for o in own)), max(high, fmean(o[1] for o in own))
    return OverSeeds(
        mean=mean,
        deviation=deviation,
        interval=(max(low, bounds[0]), min(high, bounds[1])),
        values=[*values],
    )


def _flags(audits: Sequence[Report]) -> Iterator[Flag]:
    """The doubts of the single audits, each once, by code."""
    raised: dict[str, list[Flag]] = {}
    for flag in (flag for audit in audits for flag in audit.flags):
        raised.setdefault(flag.code, []).append(flag)
    for code in sorted(raised):
        first, count = raised[code][0], len(raised[code])
        detail = f"in {count} of {len(audits)} audits, first: {first.detail}"
        yield first.model_copy(update={"detail": detail})


def _differ_by_seed(tiers: dict[Tier, CombinedTier]) -> Iterator[Flag]:
    """T014: chance in training moves unmergeability further than the trap does."""
    found = []
    for tier, result in tiers.items():
        if result.control_unmergeability is None:
            continue
        values = result.unmergeability.values
        spread = max(values) - min(values)
        gained = result.unmergeability.mean - result.control_unmergeability.mean
        if spread > gained:
            found.append(
                f"in {tier} unmergeability spreads over {100 * spread:.1f} points from seed to "
                f"seed, and is {100 * gained:.1f} points above the control's"
            )
    if found:
        yield Flag(code=CODE, title=TITLE, detail="; ".join(found))
