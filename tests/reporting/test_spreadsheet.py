import csv
import io
import json

import pytest
from samples import HOSTILE, build_report, with_intervals

from trap2.reporting import spreadsheet
from trap2.reporting.tables import partners_kept


def rows(report):
    return list(csv.DictReader(io.StringIO(spreadsheet.render(report))))


@pytest.mark.parametrize("name", ["trec6-protected", HOSTILE, 'a,"b"\n;c'])
def test_every_attack_comes_back_as_it_is_in_the_record(name):
    report = with_intervals(build_report(name=name))
    found = rows(report)
    assert len(found) == len(report.attacks)
    for row, attack in zip(found, report.attacks, strict=True):
        assert row["attack"] == attack.name
        assert row["release"] == name
        assert (row["tier"], row["admissible"]) == (attack.tier, str(attack.admissible))
        assert float(row["merged"]) == attack.merged
        assert (float(row["retained_low"]), float(row["retained_high"])) == attack.interval
        assert float(row["partners_kept"]) == partners_kept(attack.partners)
        assert json.loads(row["params"]) == attack.params
        assert json.loads(row["control_params"]) == attack.control_params


def test_what_was_not_measured_is_empty_and_no_attacks_give_no_rows():
    row = rows(build_report(control=False))[0]
    for name in ("control_retained", "control_params", "retained_low", "control_retained_high"):
        assert row[name] == ""
    assert rows(build_report().model_copy(update={"attacks": []})) == []


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@x", "\tx"])
def test_a_name_is_never_a_formula(name):
    assert rows(build_report(name=name))[0]["release"] == "'" + name
