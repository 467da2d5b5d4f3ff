"""The record of an audit: its fixed names, and that it comes back from disk as it was."""

import json
import math

import pytest
from pydantic import ValidationError

from reporting.samples import build_report
from trap2 import schema
from trap2.errors import UserError
from trap2.schema import Report, ScalePoint

FIELDS = {
    "Report": "schema_version release references utility_cost utility_cost_interval scale_curve "
    "control_scale_curve attacks frontier recovery routing tiers partners_keep thresholds evidence "
    "verdict flags limits settings versions machine seed digests rows created seconds",
    "ReleaseInfo": "name kind task classes partners base has_control trained_range trained_band "
    "recipe",
    "References": "base standalone control control_base chance relabelled partners "
    "partners_base partners_chance",
    "Evidence": "grids control_differs surrogates batch_norm_layers reload_gap",
    "Flag": "code title detail",
    "RelabelledReferences": "rows base standalone control control_base",
    "ScalePoint": "s accuracy loss",
    "PartnerScore": "merged without_release",
    "AttackResult": "name tier params merged retained admissible unconstrained_retained partners "
    "control_params control_merged control_retained control_admissible relabel_rows evaluations "
    "interval control_interval tool control_tool",
    "FrontierPoint": "attack params retained partners_retained of",
    "RecoveryPoint": "method reference budget_rows budget_steps coefficient accuracy "
    "without_release standalone retained unconstrained admissible partners control_coefficient "
    "control_accuracy control_without_release control_standalone control_retained "
    "control_admissible interval control_interval",
    "RoutingResult": "name params accuracy retained partners control_params control_accuracy "
    "control_retained",
    "TierResult": "unmergeability worst_attack control_unmergeability partners_ignored by_rows "
    "control_by_rows verdict interval control_interval",
    "Thresholds": "holds broken mergeable",
    "OverSeeds": "mean deviation interval values",
    "CombinedTier": "unmergeability control_unmergeability verdict verdicts",
    "Combined": "schema_version release seeds base standalone control utility_cost tiers "
    "thresholds flags settings rows digests",
}
"""Names on disk of schema version 1: one that goes or changes makes a new version."""


def test_the_names_of_schema_version_1_are_fixed():
    assert schema.SCHEMA_VERSION == 1
    found = {name: set(getattr(schema, name).model_fields) for name in FIELDS}
    assert found == {name: set(fields.split()) for name, fields in FIELDS.items()}
    records = {c.__name__ for c in schema.Record.__subclasses__()}
    assert records == set(FIELDS)


@pytest.mark.parametrize("control", [True, False])
def test_a_report_comes_back_from_disk_as_it_was(tmp_path, control):
    report = build_report(control, name="Ünïcode <b>")
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == report
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    written = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert written["schema_version"] == 1
    assert written["release"]["kind"] == "lora"
    assert set(written["scale_curve"][0]) == {"s", "accuracy", "loss"}
    assert written["attacks"][0]["partners"]["sst2"] == {
        "merged": pytest.approx(0.97 * 0.828),
        "without_release": 0.828,
    }


def changed(tmp_path, change):
    path = tmp_path / "report.json"
    build_report().save(path)
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(schema_version=2), "schema_version 2, this version reads 1; use the"),
        (lambda r: r.pop("schema_version"), "schema_version None, this version reads 1"),
        (lambda r: r.pop("tiers"), "not a whole report: tiers: .* run the audit again"),
        (lambda r: r.update(more=1), "not a whole report: more: "),
        (lambda r: r["references"].update(base=1.5), "references.base: .* run the audit again"),
        (lambda r: r["tiers"]["T1"].update(verdict="fine"), "tiers.T1.verdict: "),
        (lambda r: r["tiers"].update(T9=r["tiers"]["T1"]), "not a whole report: tiers.T9"),
    ],
)
def test_a_record_that_is_none_is_refused_in_one_line(tmp_path, change, message):
    path = changed(tmp_path, change)
    with pytest.raises(UserError, match=message) as caught:
        Report.load(path)
    assert "\n" not in str(caught.value)


def test_a_missing_or_broken_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*report\.json: No such file"):
        Report.load(tmp_path / "report.json")
    (tmp_path / "report.json").write_text('{"schema_version": 1,')
    with pytest.raises(UserError, match="is not valid JSON"):
        Report.load(tmp_path / "report.json")


def test_a_record_is_not_changed_after_the_fact():
    report = build_report()
    with pytest.raises(ValidationError, match="frozen"):
        report.verdict = "holds against everything"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_record_holds_no_nan(value):
    with pytest.raises(ValidationError, match="finite"):
        ScalePoint(s=1.0, accuracy=0.5, loss=value)


def test_older_records_without_the_controls_own_base_are_read(tmp_path):
    path = changed(tmp_path, lambda r: r["references"].pop("control_base"))
    assert Report.load(path).references.control_base is None


def test_older_records_without_flags_are_read(tmp_path):
    def older(record):
        del record["flags"], record["evidence"]
        del record["references"]["partners_base"], record["references"]["partners_chance"]

    report = Report.load(changed(tmp_path, older))
    assert report.flags == []
    assert report.evidence == schema.Evidence()
    assert report.references.partners_base == report.references.partners_chance == {}


def test_older_records_without_intervals_are_read(tmp_path):
    def older(record):
        del record["thresholds"], record["utility_cost_interval"]
        for part in (*record["attacks"], *record["tiers"].values()):
            del part["interval"], part["control_interval"]

    report = Report.load(changed(tmp_path, older))
    assert report.utility_cost_interval is report.tiers["T1"].interval is None
    assert (report.thresholds.holds, report.thresholds.broken) == (0.8, 0.2)
