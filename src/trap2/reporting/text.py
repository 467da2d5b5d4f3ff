"""Tables and the whole report for a terminal."""

import textwrap
from itertools import zip_longest

from trap2.reporting import tables
from trap2.reporting.tables import Table
from trap2.reporting.words import NONE, clean, percent
from trap2.schema import Report


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
        *([aligned(tables.flag_table(report), width)] if report.flags else []),
        _wrapped(f"Audited: {tables.subject(report)}", width),
        aligned(tables.reference_table(report), width),
        _wrapped(f"Utility cost: {tables.utility_cost(report)}", width),
        _wrapped(f"Partner tasks, each update alone: {partners or NONE}", width),
        aligned(tables.tier_table(report), width),
        aligned(tables.attack_table(report), width),
        *([aligned(tables.recovery_table(report), width)] if report.recovery else []),
        *([aligned(tables.routing_table(report), width)] if report.routing else []),
        _wrapped(f"Not claimed: {tables.not_claimed(report)}", width),
    ]
    if report.limits:
        items = [_wrapped(f"- {clean(limit, 1000)}", width, indent="  ") for limit in report.limits]
        blocks.append("\n".join(["Limits", *items]))
    return "\n\n".join(blocks) + "\n"


def aligned(table: Table, width: int = 100) -> str:
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


def _wrapped(text: str, width: int, indent: str = "") -> str:
    return textwrap.fill(text, width, subsequent_indent=indent)
