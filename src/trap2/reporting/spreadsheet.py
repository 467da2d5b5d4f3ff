"""The attacks of a report as CSV: numbers as they are, one row per attack."""

import csv
import io
import json

from trap2.reporting.tables import partners_kept
from trap2.schema import AttackResult, Interval, Report


def render(report: Report) -> str:
    """All attacks, fractions unrounded; what was not measured is empty."""
    rows = [_row(report, attack) for attack in report.attacks]
    stream = io.StringIO()
    table = csv.DictWriter(stream, rows[0] if rows else [], lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return stream.getvalue()


def _row(report: Report, attack: AttackResult) -> dict[str, object]:
    low, high = _ends(attack.interval)
    control_low, control_high = _ends(attack.control_interval)
    row = {
        "release": report.release.name,
        "task": report.release.task,
        "seed": report.seed,
        "attack": attack.name,
        "tier": attack.tier,
        "relabel_rows": attack.relabel_rows,
        "merged": attack.merged,
        "retained": attack.retained,
        "retained_low": low,
        "retained_high": high,
        "admissible": attack.admissible,
        "unconstrained_retained": attack.unconstrained_retained,
        "partners_kept": partners_kept(attack.partners),
        "params": json.dumps(attack.params),
        "control_merged": attack.control_merged,
        "control_retained": attack.control_retained,
        "control_retained_low": control_low,
        "control_retained_high": control_high,
        "control_admissible": attack.control_admissible,
        "control_params": json.dumps(attack.control_params) if attack.control_params else None,
        "evaluations": attack.evaluations,
    }
    return {name: _harmless(value) for name, value in row.items()}


def _ends(interval: Interval | None) -> tuple[float | None, float | None]:
    return interval or (None, None)


def _harmless(value: object) -> object:
    """Keep a spreadsheet from reading a stranger's name as a formula."""
    return f"'{value}" if isinstance(value, str) and value[:1] in "=+-@\t\r" else value
