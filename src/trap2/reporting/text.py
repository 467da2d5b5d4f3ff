"""The report in words and tables: for the terminal, for model cards, and for the page to lay out.

Every name in a record may come from a stranger, so each one passes `clean` on its way out.
"""

import html
import re
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest
from statistics import fmean

from trap2.schema import AttackResult, Params, PartnerScore, Report, ScalePoint

TIERS = {
    "T1": "merges with one shared coefficient, tuned on validation rows",
    "T2": "T1, and re-labels the outputs by a map fitted on labelled rows",
    "T3": "T2, with one coefficient per model",
}
"""What the attacker of each tier may do; every tier includes the ones before it."""

NONE = "\N{EN DASH}"
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


def clean(text: object, limit: int = 60) -> str:
    """Make text of unknown origin safe to lay out: one line, visible characters, bounded length.

    Args:
        text: A name, label, path or sentence.
        limit: Most characters to keep; what is cut is marked by an ellipsis.
    """
    line = " ".join(str(text).split())
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)
    line = re.sub(r"(\S{99})\S{2,}", "\\1\N{HORIZONTAL ELLIPSIS}", line)  # no word fills a page
    return line if len(line) <= limit else line[: limit - 1] + "\N{HORIZONTAL ELLIPSIS}"


def percent(value: float | None) -> str:
    """A fraction as `95.0%`; what was not measured as a dash."""
    return NONE if value is None else f"{100 * value:.1f}%"


def points(value: float | None) -> str:
    """A difference of fractions as `0.6 points`; what was not measured as a dash."""
    return NONE if value is None else f"{round(100 * value, 1) + 0.0:.1f} points"  # never "-0.0"


def partners_kept(partners: dict[str, PartnerScore]) -> float | None:
    """The share of their skill that partners keep on average; None if there are none to ask."""
    shares = [p.merged / p.without_release for p in partners.values() if p.without_release > 0]
    return fmean(shares) if shares else None


def not_claimed(report: Report) -> str:
    """What a reader must not conclude from this audit."""
    missing = [tier for tier in TIERS if tier not in report.tiers]
    untested = f" Tiers not tested here: {', '.join(missing)}." if missing else ""
    return (
        "Only the attacks listed below were tried, on these rows, with these partners and one seed "
        f"({report.seed}). That they fail does not show that every attack fails. Attackers who "
        "train (fine-tuning, a new read-out on the representation, distillation) are outside "
        f"these tiers, and the release used alone always works: that is its purpose.{untested}"
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
            percent(result.unmergeability),
            percent(result.control_unmergeability),
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
        if attack.tier == "T3":
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


def coefficients(params: Params) -> str:
    """The attacker's choice as `c=0.5, drop=0.2`; long lists are cut."""
    return ", ".join(f"{clean(name, 24)}={_setting(value)}" for name, value in params.items())


def render(report: Report, width: int = 100) -> str:
    """The report for a terminal, the verdict first.

    Args:
        report: The record.
        width: Most characters in a line; below 60 the tables do not fit, so 60 is used.
    """
    width = max(width, 60)
    refs = report.references
    partners = ", ".join(f"{clean(p, 24)} {percent(a)}" for p, a in refs.partners.items())
    blocks = [
        _wrapped(f"Verdict: {clean(report.verdict, 2000)}", width),
        *([aligned(flag_table(report), width)] if report.flags else []),
        _wrapped(f"Audited: {subject(report)}", width),
        aligned(reference_table(report), width),
        _wrapped(f"Utility cost: {points(report.utility_cost)} (control - standalone)", width),
        _wrapped(f"Partner tasks, each update alone: {partners or NONE}", width),
        aligned(tier_table(report), width),
        aligned(attack_table(report), width),
        _wrapped(f"Not claimed: {not_claimed(report)}", width),
    ]
    if report.limits:
        items = [_wrapped(f"- {clean(limit, 1000)}", width, indent="  ") for limit in report.limits]
        blocks.append("\n".join(["Limits", *items]))
    return "\n\n".join(blocks) + "\n"


def to_markdown(report: Report) -> str:
    """The tier table and the references as Markdown, for a model card."""
    return "\n\n".join(
        [
            _piped(tier_table(report)),
            _piped(reference_table(report)),
            f"Utility cost: {points(report.utility_cost)} (control - standalone).",
        ]
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
        mark + percent(attack.retained),
        control_mark + percent(attack.control_retained),
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


def _wrapped(text: str, width: int, indent: str = "") -> str:
    return textwrap.fill(text, width, subsequent_indent=indent)


def aligned(table: Table, width: int) -> str:
    """Lay a table out in columns; cells wrap inside theirs, the widest columns give way first."""
    columns = list(zip(table.headers, *table.rows, strict=True))
    sizes = [max([*map(len, header.split()), *map(len, cells)]) for header, *cells in columns]
    gap = "  "
    while sum(sizes) + len(gap) * (len(sizes) - 1) > width:
        sizes[sizes.index(max(sizes))] -= 1
    lines = textwrap.wrap(table.caption, width)
    for number, row in enumerate([table.headers, *table.rows]):
        wrapped = [textwrap.wrap(cell, size) or [""] for cell, size in zip(row, sizes, strict=True)]
        for parts in zip_longest(*wrapped, fillvalue=""):
            cells = [
                part.ljust(size) if left else part.rjust(size)
                for part, size, left in zip(parts, sizes, table.left, strict=True)
            ]
            lines.append(gap.join(cells).rstrip())
        if number == 0:
            lines.append(gap.join("-" * size for size in sizes))
    return "\n".join(lines + textwrap.wrap(table.note, width))


def _piped(table: Table) -> str:
    rules = [":---" if left else "---:" for left in table.left]
    body = [[_markdown(cell) for cell in row] for row in (table.headers, *table.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [body[0], rules, *body[1:]])


def _markdown(cell: str) -> str:
    """Escape a cell so that neither HTML, Markdown nor the table's bars act in it."""
    return re.sub(r"([\\`*_\[\]|~$#!])", r"\\\1", html.escape(cell, quote=False))
