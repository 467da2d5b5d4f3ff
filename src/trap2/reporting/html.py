"""Reports as self-contained pages: no network, one script of our own, everything escaped."""

import base64
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from trap2.errors import UserError
from trap2.files import write_text
from trap2.reporting import plots, tables
from trap2.reporting.comparison import leaderboard
from trap2.reporting.words import NONE, between, clean, percent, points
from trap2.schema import Report

ON_PAGE = ("accuracy", "loss", "attacks", "relabelling", "frontier", "coefficients", "recovery")


def render(report: Report) -> str:
    """The whole page of one audit as text."""
    drawings = {name: plots.FIGURES[name](report) for name in ON_PAGE}
    return _filled(
        "report.html.j2",
        report=report,
        tables=tables,
        figures={name: plots.svg(drawn) if drawn else "" for name, drawn in drawings.items()},
        provenance=_provenance(report),
    )


def render_comparison(reports: Sequence[tuple[str, Report]]) -> str:
    """Several audits on one page.

    Args:
        reports: Where each was read from, and the record.
    """
    board = leaderboard(reports)
    return _filled("compare.html.j2", reports=reports, tables=tables, board=board)


def save(report: Report, path: Path) -> None:
    """Write the page so that it is whole or absent.

    Raises:
        UserError: The place is not writable.
    """
    write_text(path, render(report))


def save_comparison(reports: Sequence[tuple[str, Report]], path: Path) -> None:
    """Write the page of several audits so that it is whole or absent.

    Args:
        reports: Where each was read from, and the record.
        path: Where to, ending in `.html`.

    Raises:
        UserError: Another suffix, or the place is not writable.
    """
    if path.suffix != ".html":
        raise UserError(f"{path} does not end in .html; a comparison is written as a page")
    write_text(path, render_comparison(reports))


def _filled(template: str, **values: Any) -> str:
    script, style = _read("page.js"), _read("page.css")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = _templates().get_template(template)
    return page.render(script=script, script_hash=f"sha256-{digest}", style=style, **values)


@functools.cache
def _templates() -> Environment:
    templates = Environment(
        loader=PackageLoader("trap2.reporting", package_path=""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters.update(percent=percent, points=points, between=between, clean=clean)
    return templates


def _read(name: str) -> str:
    return files("trap2.reporting").joinpath(name).read_text(encoding="utf-8")


def _provenance(report: Report) -> dict[str, dict[str, str]]:
    """Where the numbers come from, group by group, as words."""
    release, partners = report.release, report.references.partners
    groups: dict[str, Mapping[str, object]] = {
        "Run": {
            "created": report.created,
            "took": f"{report.seconds / 60:.1f} minutes ({report.seconds:.0f} s)",
            "seed": report.seed,
            "base": release.base,
            "partners, each update alone": ", ".join(
                f"{clean(p, 24)} {percent(partners.get(p))}" for p in release.partners
            ),
            "trained range": release.trained_range,
            "trained band": release.trained_band,
        },
        "Rows": report.rows,
        "Settings": report.settings,
        "Versions": report.versions,
        "Machine": report.machine,
        "Digests": report.digests,
    }
    return {
        title: {clean(key): _value(value) for key, value in group.items()}
        for title, group in groups.items()
        if group
    }


def _value(value: object) -> str:
    if value is None:
        return NONE
    worded = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return clean(worded, 300)
