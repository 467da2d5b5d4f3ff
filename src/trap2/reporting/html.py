"""The report as one self-contained page: no script, no network, everything escaped."""

import json
from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from trap2.files import write_text
from trap2.reporting import plots, text
from trap2.schema import Report


def render(report: Report) -> str:
    """The whole page as text."""
    page = Environment(
        loader=PackageLoader("trap2.reporting", package_path=""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page.filters.update(percent=text.percent, points=text.points, clean=text.clean)
    return page.get_template("report.html.j2").render(
        report=report,
        text=text,
        scale_curve=plots.scale_curve_svg(report) if report.scale_curve else "",
        frontier=plots.frontier_svg(report) if report.frontier else "",
        provenance=_provenance(report),
    )


def save(report: Report, path: Path) -> None:
    """Write the page so that it is whole or absent.

    Raises:
        UserError: The place is not writable.
    """
    write_text(path, render(report))


def _provenance(report: Report) -> dict[str, dict[str, str]]:
    """Where the numbers come from, group by group, as words."""
    release, partners = report.release, report.references.partners
    groups: dict[str, Mapping[str, object]] = {
        "Run": {
            "created": report.created,
            "seconds": f"{report.seconds:.0f}",
            "seed": report.seed,
            "base": release.base,
            "partners, each update alone": ", ".join(
                f"{text.clean(p, 24)} {text.percent(partners.get(p))}" for p in release.partners
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
        title: {text.clean(key): _value(value) for key, value in group.items()}
        for title, group in groups.items()
        if group
    }


def _value(value: object) -> str:
    if value is None:
        return text.NONE
    worded = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text.clean(worded, 300)
