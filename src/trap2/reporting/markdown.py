"""A report and its tables as Markdown."""

import html
import re
from collections.abc import Iterable

from trap2.reporting import tables
from trap2.reporting.tables import Table
from trap2.reporting.words import clean
from trap2.schema import Report


def render(report: Report) -> str:
    """The whole report."""
    title = f"# Merging audit of {escaped(clean(report.release.name))}"
    attacks = _explained(tables.attack_table(report, details=True))
    attacks += _explained(tables.recovery_table(report)) if report.recovery else []
    attacks += _explained(tables.routing_table(report)) if report.routing else []
    return "\n\n".join([title, *audit_sections(report), "## Attacks", *attacks]) + "\n"


def audit_sections(report: Report) -> list[str]:
    """What an audit found, its limits, and how to repeat it, in blocks under `##` headings."""
    flags = [f"{clean(f.code, 9)} {clean(f.title)}: {clean(f.detail, 1000)}" for f in report.flags]
    rows, release = report.rows, report.release
    methods = dict.fromkeys(clean(attack.name) for attack in report.attacks)
    facts = [
        f"weights {report.digests.get('release', 'unknown')}, "
        f"base {report.digests.get('base', 'unknown')}",
        f"merged with {', '.join(clean(p, 24) for p in release.partners) or 'nothing'}, "
        f"by {', '.join(methods) or 'no method'}",
        f"tuned on {rows.get('validation', 0)} validation rows, scored once on "
        f"{rows.get('test', 0)} test rows, seed {report.seed}",
        f"trap2 {clean(report.versions.get('trap2', 'unknown'), 24)}, {clean(report.created, 32)}",
    ]
    return [
        "## What an audit found",
        _listed(tables.verdict(report)),
        *_explained(tables.tier_table(report)),
        *_explained(tables.reference_table(report)),
        f"Utility cost: {escaped(tables.utility_cost(report))}.",
        *(["Reasons to doubt this audit:", _listed(flags)] if flags else []),
        "## Limits of the audit",
        escaped(tables.not_claimed(report)),
        _listed(clean(limit, 1000) for limit in report.limits),
        "## How it was audited, and how to repeat it",
        _listed(facts),
        "`report.json` holds every setting and number. With the base, the partners and their rows, "
        "`trap2 audit audit.yaml --out audit/` repeats it; `trap2 verify . --report report.json` "
        "says whether the report is of these weights.",
    ]


def piped(table: Table) -> str:
    """A table with its bars."""
    rules = [":---" if left else "---:" for left in table.left]
    body = [[escaped(cell) for cell in row] for row in (table.headers, *table.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [body[0], rules, *body[1:]])


def escaped(cell: str) -> str:
    """Escape a cell so that neither HTML, Markdown nor the table's bars act in it."""
    return re.sub(r"([\\`*_\[\]|~$#!])", r"\\\1", html.escape(cell, quote=False))


def _explained(table: Table) -> list[str]:
    """A table under its caption, with what its note says."""
    notes = [f"{escaped(table.note)}."] if table.note else []
    return [f"{escaped(table.caption)}:", piped(table), *notes]


def _listed(lines: Iterable[str]) -> str:
    return "\n".join(f"- {escaped(line)}" for line in lines)
