"""The audit doubts itself: signs that not the protection decided the result, but the test.

Each check goes from the finished record to the reason for doubt in words, or to "" where there is
none. Codes are for ever; `docs/flags.md` says of each what it means and what to do.

Symbols (docs/method.md): a0 base, a1 standalone.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from trap2.auditing.verdict import has_skill
from trap2.registry import Registry
from trap2.schema import Flag, Params, Report

FAR_BELOW = 0.5
"""Share of what guessing gets: who knows nothing guesses, only who knows does far worse."""

BROUGHT_BACK = 0.2
"""Share of the skill that labelled rows give back; as much parts `holds` from perfect."""

BLUR = 0.4
"""Widest interval of a share of the skill: +-0.2 of it parts `holds` from perfect."""

LOGIT_GAP = 1e-3
"""Share of the largest logit; rounding stays near 1e-6, a tensor left out goes far beyond."""

AWAY = 0.3
"""Distance from scale 1 beyond which a trap that closed leaves nothing, on either side."""

STILL_WORKS = 0.5
"""Share of the skill; a trap that closed leaves next to none, one that did not nearly all."""

OUTDONE = 0.1
"""Share of the skill that fewer means get above more; less may be chance between rows."""

TIERS = ("T1", "T2", "T3")
"""Tiers of the same attacks with ever more means."""

SHOWN = 6
"""Most things named in one reason; more are counted."""

Reason = Callable[[Report], str]


@dataclass(frozen=True)
class Check:
    """One reason to doubt: its code, its title and how it is found."""

    code: str
    title: str
    reason: Reason


CHECKS: Registry[Check] = Registry("check")


def raised(report: Report) -> list[Flag]:
    """Every flag that a record deserves, in the order of the codes."""
    found = [(check, check.reason(report)) for check in map(CHECKS.get, CHECKS)]
    return [Flag(code=c.code, title=c.title, detail=reason) for c, reason in found if reason]


def _check(code: str, title: str) -> Callable[[Reason], Reason]:
    def register(reason: Reason) -> Reason:
        CHECKS.add(code, Check(code, title, reason))
        return reason

    return register


@_check("T001", "the release is useless alone")
def useless_release(report: Report) -> str:
    """No skill above the base: a merge keeps no skill of none."""
    known = report.references
    if has_skill(known):
        return ""
    return (
        f"as released it reaches {_percent(known.standalone)}, its base {_percent(known.base)}: "
        "there is no skill that a merge could keep or lose"
    )


@_check("T002", "a partner is useless alone")
def useless_partner(report: Report) -> str:
    """A partner without skill has nothing to lose, so every merge is admissible to it."""
    known = report.references
    found = []
    for name, alone in known.partners.items():
        floor = max(known.partners_base.get(name, 0.0), known.partners_chance.get(name, 0.0))
        if alone <= floor:
            found.append(f"'{name}' {_percent(alone)} (base or chance {_percent(floor)})")
    return _listed("no skill on its own task: ", found)


@_check("T003", "there is no control")
def no_control(report: Report) -> str:
    """Unmergeability means something only beside the control's."""
    if report.release.has_control:
        return ""
    return "without the same recipe at strength 0, nothing says that a merge would have worked"


@_check("T004", "the control hardly merges")
def control_hardly_merges(report: Report) -> str:
    """Nothing to protect: what fails for the control, the trap cannot be thanked for."""
    found = [
        f"{_percent(1 - result.control_unmergeability)} in {tier}"
        for tier, result in report.tiers.items()
        if result.control_unmergeability is not None
        and result.control_unmergeability > 1 - report.thresholds.mergeable
    ]
    return _listed("the most that a merge keeps of the control's skill is ", found)


@_check("T005", "control and release were trained differently")
def trained_differently(report: Report) -> str:
    """Then the trap is not the only thing that parts them."""
    keys = report.evidence.control_differs
    if not report.release.has_control or keys == []:
        return ""
    if keys is None:
        return "one of the two has no recipe in its trap2.json, so they cannot be compared"
    return _listed("their recipes differ in ", keys)


@_check("T006", "no merge of the control counts")
def control_never_admissible(report: Report) -> str:
    """The constraint decided, not the protection."""
    if not report.release.has_control or any(a.control_admissible for a in report.attacks):
        return ""
    return (
        "no attack found a mixture with some of the control's skill in which the partners keep "
        f"{_percent(report.partners_keep)}"
    )


@_check("T007", "answers far below chance")
def below_chance(report: Report) -> str:
    """Who is wrong that often knows the answer: the skill is turned round, not gone."""
    if not report.release.classes:
        return ""  # who guesses tokens is hardly ever right anyway
    guess = 1 / report.release.classes
    raw = [a for a in report.attacks if a.relabel_rows == 0 and a.admissible]
    found = [(p.accuracy, f"alone at scale {p.s:g}") for p in report.scale_curve if p.s != 0]
    found += [(a.merged, f"merged by {a.name} ({a.tier})") for a in raw]
    accuracy, where = min(found, default=(1.0, ""))
    if accuracy >= FAR_BELOW * guess:
        return ""
    return (
        f"{where} it is right in {_percent(accuracy)} of the rows, guessing in "
        f"{_percent(guess)}: the skill may only be turned round, so judge by T2 and T3"
    )


@_check("T008", "re-labelling brings the skill back")
def relabelled_back(report: Report) -> str:
    """T1 flatters a release whose answers are moved and not hidden."""
    if not {"T1", "T2"} <= report.tiers.keys():
        return ""
    raw, read = (1 - report.tiers[tier].unmergeability for tier in ("T1", "T2"))
    if read - raw <= BROUGHT_BACK:
        return ""
    return (
        f"a merge keeps {_percent(raw)} of the skill as it is (T1) and {_percent(read)} once its "
        "outputs are re-labelled (T2): T1 says nothing here"
    )


@_check("T009", "too few rows for the claim")
def too_few_rows(report: Report) -> str:
    """Where a0 and a1 are blurred, so is every share of what lies between them."""
    known = report.references
    effect = known.standalone - known.base
    rows = min(report.rows["validation"], report.rows["test"])
    width = max(_interval(accuracy, rows) for accuracy in (known.base, known.standalone))
    if effect <= 0:
        return ""
    # A score between right and wrong varies less than this: there the interval itself must tell.
    if report.release.classes and width > BLUR * effect:
        return (
            f"on {rows} rows the 95 % interval of an accuracy is {100 * width:.1f} points wide, "
            f"and the whole skill measures {100 * effect:.1f} points"
        )
    wide = [
        f"from {_percent(low)} to {_percent(high)} in {tier}"
        for tier, result in report.tiers.items()
        for low, high in [result.interval or (0.0, 0.0)]
        if high - low > BLUR
    ]
    return _listed("the 95 % interval of unmergeability reaches ", wide)


def _interval(share: float, rows: int) -> float:
    """Width of the 95 % interval of a share of so many rows (Wilson 1927)."""
    z = 1.96
    spread = math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    return 2 * z * spread / (1 + z * z / rows)


@_check("T010", "the best choice lies at the edge of its grid")
def edge_of_grid(report: Report) -> str:
    """A stronger attacker may wait just outside what was tried; T3 has no shared grid."""
    found: dict[str, None] = {}
    for attack in (a for a in report.attacks if a.tier != "T3"):
        if attack.admissible:
            found |= dict.fromkeys(_edges(report, attack.name, "release", attack.params))
        if attack.control_admissible:
            found |= dict.fromkeys(
                _edges(report, attack.name, "control", attack.control_params or {})
            )
    return _listed("the attacker chose the largest or the smallest it tried: ", list(found))


def _edges(report: Report, attack: str, side: str, chosen: Params) -> Iterator[str]:
    """Choices at an end of their grid beyond which there is more."""
    for key, values in report.evidence.grids.get(attack, {}).items():
        shared = key in ("coefficient", "place")
        # Nothing lies beyond 0, nor beyond 1 for a share; a seed has no order, one value no ends.
        closed = (0.0,) if key == "coefficient" else (0.0, 1.0)
        ends = {min(values), max(values)} if values[1:] and key != "seed" else ()
        for end in ends:
            if end not in closed and end == chosen.get(f"c[{side}]" if shared else key):
                yield f"{attack} {key}={end:g} ({side})"


@_check("T011", "the base has batch-norm layers")
def batch_norm(report: Report) -> str:
    """Merged models need new running statistics, which this attacker may not have made."""
    layers = report.evidence.batch_norm_layers
    if not layers or report.settings.get("recompute_statistics"):
        return ""
    return (
        f"running statistics of {layers} layers are not recomputed after a merge, as an attacker "
        "with unlabelled rows would do; set attacker.recompute_statistics"
    )


@_check("T012", "the merge path does not reproduce the release")
def path_differs(report: Report) -> str:
    """One model at s = 1 must be that model; if it is not, every merge is of something else."""
    found = [
        f"the {side} cannot be loaded by transformers"
        if gap is None
        else f"the {side} at s = 1 is off by {100 * gap:.2g} % of its largest logit"
        for side, gap in report.evidence.reload_gap.items()
        if gap is None or gap > LOGIT_GAP
    ]
    return _listed("", found)


@_check("T013", "a partner was there in training")
def known_partner(report: Report) -> str:
    """Partners of an audit must be strangers to the release."""
    met = [f"'{p}'" for p in report.release.partners if p in report.evidence.surrogates]
    return _listed("the release was trained against ", met)


@_check("T015", "a simple attack beats a stronger one")
def simple_attack_beats(report: Report) -> str:
    """More means include the fewer: who gets less with more has searched badly."""
    found: list[str] = []
    skill = report.references.standalone - report.references.base
    for side in ("release", "control"):
        best = _best(report, side)
        found += [
            f"{name} ({side}) {_percent(right)} in {tier} and {_percent(best[name, later])} in "
            f"{later}"
            for (name, tier), right in best.items()
            for later in TIERS[TIERS.index(tier) + 1 :]
            if (name, later) in best and right - best[name, later] > OUTDONE * skill
        ]
    return _listed("right answers of the best merge: ", found)


@_check("T016", "the trap is open")
def trap_open(report: Report) -> str:
    """Alone and re-scaled the release still works: where merges failed, not the trap did it."""
    skill = report.references.standalone - report.references.base
    off = [p for p in report.scale_curve if p.s != 0 and abs(p.s - 1) >= AWAY]
    best = max(off, key=lambda point: point.accuracy, default=None)
    if best is None or skill <= 0:
        return ""
    kept = (best.accuracy - report.references.base) / skill
    if kept <= STILL_WORKS:
        return ""
    return (
        f"alone at scale {best.s:g} it keeps {_percent(kept)} of its skill: merges that fail here "
        "do so for the partners' sake or by chance, and others will not"
    )


def _best(report: Report, side: str) -> dict[tuple[str, str], float]:
    """Accuracy of each attack's best merge that counts, by tier."""
    best: dict[tuple[str, str], float] = {}
    for a in report.attacks:
        ours = side == "release"
        counts = a.admissible if ours else a.control_admissible
        right = a.merged if ours else a.control_merged
        if counts and right is not None and a.tier in TIERS:
            best[a.name, a.tier] = max(right, best.get((a.name, a.tier), 0.0))
    return best


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _listed(before: str, things: Sequence[str]) -> str:
    """The sentence with its things; nothing where there are none."""
    more = f" and {len(things) - SHOWN} more" if things[SHOWN:] else ""
    return before + ", ".join(things[:SHOWN]) + more if things else ""
