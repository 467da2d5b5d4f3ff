import re

import pytest
from samples import HOSTILE, build_report

from trap2.errors import UserError
from trap2.files import weights_digest
from trap2.reporting.model_card import END, START, embed
from trap2.schema import Report


@pytest.fixture
def release(tmp_path):
    folder = tmp_path / "release"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "README.md").write_text("---\ntags:\n- trap2\n---\n\n# topics\n", encoding="utf-8")
    return folder


def report_of(folder, **options):
    report = build_report(**options)
    digests = report.digests | {"release": weights_digest(folder)}
    return report.model_copy(update={"digests": digests})


def test_the_card_keeps_what_it_said_and_gets_the_audit(release):
    report = report_of(release)
    embed(report, release)
    card = (release / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\ntags:\n- trap2\n---\n\n# topics\n\n" + START)
    assert card.endswith(END + "\n")
    assert report.verdict[:60] in card
    parts = ["## What an audit found", "| T3 |", "## Limits of the audit", "## How it was audited"]
    parts += [report.digests["release"], "trap2 verify . --report report.json"]
    places = [card.index(part) for part in parts]
    assert places == sorted(places)
    assert Report.load(release / "report.json") == report


def test_a_second_audit_takes_the_place_of_the_first(release):
    embed(report_of(release), release)
    card = release / "README.md"
    once = card.read_text(encoding="utf-8")
    embed(report_of(release), release)
    assert card.read_text(encoding="utf-8") == once
    card.write_text(once + "\nMy own words.\n", encoding="utf-8")
    embed(report_of(release).model_copy(update={"verdict": "another"}), release)
    now = card.read_text(encoding="utf-8")
    assert now.endswith(END + "\n\nMy own words.\n")
    assert now.count("## What an audit found") == 1
    assert "\n- another\n" in now


def test_a_release_without_a_card_gets_one(release):
    (release / "README.md").unlink()
    embed(report_of(release), release)
    assert (release / "README.md").read_text(encoding="utf-8").startswith(START)


def test_a_name_cannot_end_the_audits_part(release):
    for name in (HOSTILE, END, START):
        embed(report_of(release, name=name), release)
        card = (release / "README.md").read_text(encoding="utf-8")
        assert (card.count(START), card.count(END)) == (1, 1)
        assert "<script" not in card
        assert "\u202e" not in card


def test_a_report_of_other_weights_is_refused_and_nothing_changes(release):
    report = report_of(release)
    before = (release / "README.md").read_bytes()
    (release / "model.safetensors").write_bytes(b"others")
    wanted = (
        f"the report is of weights {report.digests['release']}, but those in {release} are "
        f"{weights_digest(release)}; give the report of these weights, or audit them"
    )
    with pytest.raises(UserError, match=re.escape(wanted)):
        embed(report, release)
    assert (release / "README.md").read_bytes() == before
    assert not (release / "report.json").exists()
    with pytest.raises(UserError, match="is not a folder; give a release folder"):
        embed(report, release / "nowhere")


@pytest.mark.parametrize("broken", [START, END, f"{END} {START}", f"{START} {START} {END}"])
def test_a_card_with_broken_markers_is_left_alone(release, broken):
    (release / "README.md").write_text(broken, encoding="utf-8")
    with pytest.raises(UserError, match=r"README\.md holds .* out of order; leave one pair or no"):
        embed(report_of(release), release)
    assert (release / "README.md").read_text(encoding="utf-8") == broken
    assert not (release / "report.json").exists()


def test_a_card_that_is_no_text_is_refused(release):
    (release / "README.md").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"cannot read .*README\.md: .*; mend it or move it away"):
        embed(report_of(release), release)


def test_weights_that_cannot_be_read_are_named(release):
    report = report_of(release)
    (release / "more.safetensors").symlink_to(release / "gone")
    with pytest.raises(UserError, match=r"cannot read .*more\.safetensors: No such file"):
        embed(report, release)
