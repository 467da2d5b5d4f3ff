"""A report in the format that the name of the file asks for."""

from pathlib import Path

from trap2.errors import UserError
from trap2.files import write_text
from trap2.reporting import markdown, spreadsheet
from trap2.schema import Report

FORMATS = (".html", ".md", ".csv", ".svg", ".png")


def export(report: Report, path: Path, figure: str = "summary") -> None:
    """Draw a report again, from its record alone.

    Args:
        report: The record.
        path: Where to; its suffix is one of `FORMATS`.
        figure: Which figure, for `.svg` and `.png`.

    Raises:
        UserError: Another suffix, no such figure, a figure of what the record does not hold, or the
            place is not writable.
    """
    if path.suffix not in FORMATS:
        raise UserError(f"{path} has no suffix that says a format; end it in {', '.join(FORMATS)}")
    if path.suffix == ".md":
        write_text(path, markdown.render(report))
    elif path.suffix == ".csv":
        write_text(path, spreadsheet.render(report))
    elif path.suffix == ".html":
        from trap2.reporting import html

        html.save(report, path)
    else:
        _export_figure(report, path, figure)


def _export_figure(report: Report, path: Path, figure: str) -> None:
    from trap2.reporting import plots

    if figure not in plots.FIGURES:
        raise UserError(f"no figure is called '{figure}'; choose from {', '.join(plots.FIGURES)}")
    drawing = plots.FIGURES[figure](report)
    if drawing is None:
        raise UserError(f"the record holds nothing for the figure '{figure}'; choose another")
    plots.save(drawing, path)
