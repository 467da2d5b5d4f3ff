"""The tables and sentences of a report, ready to lay out in a page, a terminal or Markdown."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

from trap2.reporting.words import NONE, clean, percent, points
from trap2.schema import AttackResult, Params, PartnerScore, Report, ScalePoint

TIERS = {
    "T1": "merges with one shared coefficient, tuned on validation rows",
    "T2": "T1, and re-labels the outputs by a map fitted on labelled rows",
    "T3": "T2, with one coefficient per model",
    "T4": "T2, with attacks that look at unlabelled rows of every task",
    "T5": "training on labelled rows: a probe, or fine-tuning before or after the merge",
}
"""What the attacker of each tier may do; every tier includes the ones before it."""

_ATTACK_HEADERS = (
    "attack",
    "tier",
    "labelled rows",
    "release retained",
    "control retained",
    "release merged",
    "partners kept",
    "coefficients",
)


@dataclass(frozen=True)
class Table:
    """A table of ready words; columns named in `words` are set left, all others are numbers."""

    caption: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: tuple[str, ...]
    note: str = ""

    @property
    def left(self) -> list[bool]:
        """Per column, whether it is set left."""
        return [header in self.words for header in self.headers]


def partners_kept(partners: dict[str, PartnerScore]) -> float | None:
    """The share of their skill that partners keep on average; None if there are none to ask."""
    shares = [p.merged / p.without_release for p in partners.values() if p.without_release > 0]
    return fmean(shares) if shares else None


def not_claimed(report: Report) -> str:
    """What a reader must not conclude from this audit."""
    missing = [tier for tier in TIERS if tier not in report.tiers]
    untested = f" Tiers not tested here: {', '.join(missing)}." if missing else ""
    return (
        "Only the attacks listed here were tried, on these rows, with these partners and one seed "
        f"({report.seed}). That they fail does not show that every attack fails. Distillation is "
        "outside these tiers, and the release used alone always works: that is its purpose."
        f"{untested}"
    )


def subject(report: Report) -> str:
    """What was audited, in one line."""
    release = report.release
    partners = ", ".join(clean(p, 24) for p in release.partners[:8]) or "nothing"
    partners += f" and {len(release.partners) - 8} more" if len(release.partners) > 8 else ""
    return (
        f"{clean(release.name)} ({release.kind}, task {clean(release.task, 24)}, "
        f"{release.classes} classes), merged with {partners}"
    )


def verdict(report: Report) -> list[str]:
    """The verdict, sentence by sentence: first of the release, then of each tier."""
    return re.split(r"(?<=\.) (?=[A-Z])", clean(report.verdict, 2000))


def utility_cost(report: Report) -> str:
    """What the trap costs as released, in points."""
    return f"{points(report.utility_cost, report.utility_cost_interval)} (control - standalone)"


def flag_table(report: Report) -> Table:
    """The reasons to doubt this audit, by code."""
    headers = ("flag", "raised because", "here")
    return Table(
        "Reasons to doubt this audit",
        headers,
        tuple((clean(f.code, 9), clean(f.title), clean(f.detail, 1000)) for f in report.flags),
        headers,
        "docs/flags.md says what each one means and what to do",
    )


def tier_table(report: Report) -> Table:
    """Unmergeability of release and control, tier by tier."""
    headers = ["tier", "the attacker", "release", "control", "verdict", "worst attack"]
    rows = [
        [
            tier,
            TIERS[tier],
            percent(result.unmergeability, result.interval),
            percent(result.control_unmergeability, result.control_interval),
            result.verdict,
            clean(result.worst_attack),
        ]
        for tier, result in sorted(report.tiers.items())
    ]
    if any(result.by_rows for result in report.tiers.values()):
        headers.insert(4, "by labelled rows: release (control)")
        for row, (_, result) in zip(rows, sorted(report.tiers.items()), strict=True):
            control = result.control_by_rows
            cells = [
                f"{clean(n, 9)}:\N{NO-BREAK SPACE}{percent(u)}"
                + (f"\N{NO-BREAK SPACE}({percent(control[n])})" if n in control else "")
                for n, u in result.by_rows.items()
            ]
            row.insert(4, ", ".join(cells) or NONE)
    return Table(
        "Unmergeability by attacker",
        tuple(headers),
        tuple(map(tuple, rows)),
        ("tier", "the attacker", "verdict", "worst attack", headers[4]),
        "unmergeability = 1 - the largest share of the skill that any attack of the tier keeps",
    )


def reference_table(report: Report) -> Table:
    """What the attacks are measured against, raw and read through a re-labelling map."""
    refs = report.references
    rows = [("as they are", refs.chance, refs.base, refs.control, refs.standalone)]
    rows += [
        (f"re-labelled, {r.rows} rows", refs.chance, r.base, r.control, r.standalone)
        for r in refs.relabelled
    ]
    return Table(
        "Accuracy on test rows, nothing merged",
        ("outputs", "chance", "base", "control", "standalone"),
        tuple((words, *map(percent, numbers)) for words, *numbers in rows),
        ("outputs",),
    )


def relabelling_table(report: Report) -> Table:
    """What re-labelling gives back: references and merges with one coefficient, read both ways."""
    refs = report.references
    read: dict[str, dict[int, str]] = {
        "chance": {0: percent(refs.chance)},
        "base model": {0: percent(refs.base)} | {r.rows: percent(r.base) for r in refs.relabelled},
        "release alone": {0: percent(refs.standalone)}
        | {r.rows: percent(r.standalone) for r in refs.relabelled},
        "control alone": {0: percent(refs.control)}
        | {r.rows: percent(r.control) for r in refs.relabelled},
    }
    for attack in report.attacks:
        if attack.tier not in ("T1", "T2"):
            continue
        name = clean(attack.name)
        for who, merged, counts in (
            ("release", attack.merged, attack.admissible),
            ("control", attack.control_merged, attack.control_admissible is not False),
        ):
            cells = read.setdefault(f"{who} merged by {name}", {})
            cells[attack.relabel_rows] = ("" if counts else "*") + percent(merged)
    counts_of_rows = sorted({n for cells in read.values() for n in cells})
    rows = tuple(
        (who, *(cells.get(n, NONE) for n in counts_of_rows)) for who, cells in read.items()
    )
    rows = tuple(row for row in rows if set(row[1:]) != {NONE})  # no control: not in the table
    return Table(
        "Accuracy on the protected task",
        ("what is read", *(f"{n} rows" if n else "raw" for n in counts_of_rows)),
        rows,
        ("what is read",),
        _note(rows),
    )


def scale_table(report: Report) -> Table:
    """The scale curve in numbers."""
    release = {point.s: point for point in report.scale_curve}
    control = {point.s: point for point in report.control_scale_curve}

    def cells(point: ScalePoint | None) -> tuple[str, str]:
        return (percent(point.accuracy), f"{point.loss:.3g}") if point else (NONE, NONE)

    return Table(
        "Accuracy and loss against scale, nothing merged",
        ("scale", "release", "release loss", "control", "control loss"),
        tuple(
            (f"{s:.3g}", *cells(release.get(s)), *cells(control.get(s)))
            for s in sorted(release | control)
        ),
        (),
    )


def attack_table(report: Report, details: bool = False) -> Table:
    """Every attack with what it reached.

    Args:
        report: The record.
        details: Add the control's side, and what is retained when the partners do not matter.
    """
    more = (
        ("control merged", "retained, partners ignored", "control coefficients") if details else ()
    )
    width = len(_ATTACK_HEADERS) + len(more)
    rows = tuple(_attack_row(attack)[:width] for attack in report.attacks)
    return Table(
        "Attacks, tuned on validation rows, scored on test rows",
        (*_ATTACK_HEADERS, *more),
        rows,
        ("attack", "tier", "coefficients", "control coefficients"),
        _note(rows),
    )


def recovery_table(report: Report) -> Table:
    """What attackers who train get, by budget, with the release and without it."""
    return Table(
        "Attackers who train: accuracy on the protected task by budget",
        (
            "method",
            "rows",
            "steps",
            "release",
            "without it",
            "control",
            "without",
            "retained",
            "of control's",
        ),
        tuple(
            (
                clean(p.method) + (" (reference)" if p.reference else ""),
                str(p.budget_rows),
                str(p.budget_steps) if p.budget_steps else NONE,
                ("" if p.admissible else "*") + percent(p.accuracy),
                percent(p.without_release),
                ("*" if p.control_admissible is False else "") + percent(p.control_accuracy),
                percent(p.control_without_release),
                percent(p.retained, p.interval),
                percent(p.control_retained, p.control_interval),
            )
            for p in report.recovery
        ),
        ("method",),
        "* no merge counts, so the release is left out; retained: the share of "
        "what the release has beyond the same budget without it",
    )


def routing_table(report: Report) -> Table:
    """What is left of every model where they are stored merged and used apart."""
    return Table(
        "Routing: stored merged, used apart, in no tier",
        ("method", "parameters", "release", "retained", "control", "of control's", "partners"),
        tuple(
            (
                clean(r.name),
                coefficients(r.params) or NONE,
                percent(r.accuracy),
                percent(r.retained),
                percent(r.control_accuracy),
                percent(r.control_retained),
                ", ".join(f"{clean(p, 24)} {percent(a)}" for p, a in r.partners.items()) or NONE,
            )
            for r in report.routing
        ),
        ("method", "parameters", "partners"),
        "every model is used by itself, near its own scale 1: no protection in the weights can "
        "claim to stop that",
    )


def coefficients(params: Params) -> str:
    """The attacker's choice as `c=0.5, drop=0.2`; one coefficient for all models is said once."""
    models = [name for name in params if name.startswith("c[")]
    if models[1:] and len({str(params[name]) for name in models}) == 1:
        rest = {name: value for name, value in params.items() if name not in models}
        params = {"c": params[models[0]], **rest}
    return ", ".join(f"{clean(name, 24)}={_setting(value)}" for name, value in params.items())


def chosen_coefficients(report: Report) -> Table:
    """The coefficient of every model in the mixtures chosen with one coefficient per model."""
    chosen = [
        (attack, who, params)
        for attack in report.attacks
        if attack.tier == "T3"
        for who, params in (("release", attack.params), ("control", attack.control_params or {}))
        if params
    ]
    own = {"c[release]": "its own", "c[control]": "its own"}
    names = dict.fromkeys(
        own.get(key, key) for _, _, params in chosen for key in params if key.startswith("c[")
    )
    rows = []
    for attack, who, params in chosen:
        values = {own.get(key, key): value for key, value in params.items()}
        cells = [_setting(values[name]) if name in values else NONE for name in names]
        rows.append((clean(attack.name), str(attack.relabel_rows or NONE), who, *cells))
    return Table(
        "Coefficients the attacker chose, one per model",
        (
            "attack",
            "labelled rows",
            "merged",
            *(clean(n.removeprefix("c[").removesuffix("]"), 24) for n in names),
        ),
        tuple(rows),
        ("attack", "merged"),
    )


def _note(rows: Iterable[tuple[str, ...]]) -> str:
    """What the star means, if a star is shown."""
    starred = any(cell.startswith("*") for row in rows for cell in row)
    return "* the partners lose too much: not an admissible merge, it does not count" * starred


def _attack_row(attack: AttackResult) -> tuple[str, ...]:
    mark = "" if attack.admissible else "*"
    control_mark = "*" if attack.control_admissible is False else ""
    return (
        clean(attack.name),
        attack.tier,
        str(attack.relabel_rows) if attack.relabel_rows else NONE,
        mark + percent(attack.retained, attack.interval),
        control_mark + percent(attack.control_retained, attack.control_interval),
        percent(attack.merged),
        percent(partners_kept(attack.partners)),
        coefficients(attack.params),
        percent(attack.control_merged),
        percent(attack.unconstrained_retained),
        coefficients(attack.control_params or {}) or NONE,
    )


def _setting(value: float | int | str | bool | list[float]) -> str:
    if isinstance(value, list):
        shown = " ".join(f"{v:.3g}" for v in value[:6])
        return f"[{shown} \N{HORIZONTAL ELLIPSIS} {len(value)}]" if value[6:] else f"[{shown}]"
    return f"{value:.3g}" if isinstance(value, float) else clean(value, 24)
