"""The audit in the model card: what was found travels with the weights it was found on."""

from pathlib import Path

from trap2.errors import UserError
from trap2.files import write_text
from trap2.reporting import markdown
from trap2.schema import Report

START, END = "<!-- trap2 audit: start -->", "<!-- trap2 audit: end -->"
"""Markers in `README.md`; only what stands between them is replaced."""


def embed(report: Report, folder: Path) -> None:
    """Write the audit into the card of a release, and the record beside it.

    Args:
        report: The record.
        folder: The release; its `README.md` keeps everything outside the markers, and gets the
            audit at its end if it has none.

    Raises:
        UserError: The report is of other weights, a marker lacks its other half, or the release
            cannot be read or written.
    """
    report.check_weights(folder)
    card = folder / "README.md"
    try:
        old = card.read_text(encoding="utf-8") if card.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {card}: {error}; mend it or move it away") from error
    audit = "\n\n".join([START, *markdown.audit_sections(report), END])
    whole = _replaced(old, audit, card)
    report.save(folder / "report.json")
    write_text(card, whole)


def _replaced(old: str, audit: str, card: Path) -> str:
    counts = old.count(START), old.count(END)
    if counts == (0, 0):
        return f"{old.rstrip()}\n\n{audit}\n".lstrip()
    before, _, rest = old.partition(START)
    _, end, after = rest.partition(END)
    if counts != (1, 1) or not end:
        raise UserError(
            f"{card} holds {counts[0]} '{START}' and {counts[1]} '{END}' out of order; "
            "leave one pair or none"
        )
    return before + audit + after
