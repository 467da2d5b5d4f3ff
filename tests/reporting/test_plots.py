import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import matplotlib
import pytest
from PIL import Image
from samples import build_report

from trap2.errors import UserError
from trap2.reporting import plots

HOSTILE = '<script>alert(1)</script>"\' id="x" $\\frac{$ \u202eevil \u6f22 ' + "A" * 10_000
FIGURES = [plots.scale_curve_svg, plots.frontier_svg]


def ids(svg):
    return set(re.findall(r'\sid="([^"]+)"', svg))


@pytest.mark.parametrize("draw", FIGURES)
def test_one_whole_svg_element_with_a_description(draw):
    svg = draw(build_report())
    root = ET.fromstring(svg)
    assert svg.startswith("<svg")
    assert root.tag.endswith("svg")
    assert root.get("role") == "img"
    assert "%" in root.get("aria-label")
    assert not re.search(r"<(script|image|foreignObject|metadata)", svg)


@pytest.mark.parametrize("draw", FIGURES)
def test_same_record_same_bytes(draw):
    assert draw(build_report()) == draw(build_report())


def test_ids_of_two_figures_on_one_page_differ_and_resolve():
    scale, frontier = (draw(build_report()) for draw in FIGURES)
    assert not ids(scale) & ids(frontier)
    for svg in (scale, frontier):
        used = re.findall(r'(?:url\(#|href="#)([^")]+)', svg)
        assert used
        assert set(used) <= ids(svg)


def test_style_rules_stay_inside_their_figure():
    for rules in re.findall(r"<style[^>]*>([^<]*)", plots.scale_curve_svg(build_report())):
        assert rules.startswith("#scale-curve *")


def test_descriptions_carry_the_numbers():
    report = build_report()
    scale = ET.fromstring(plots.scale_curve_svg(report)).get("aria-label")
    assert "Release: 95.0% at scale 1, lowest 1.7% at scale 0.5." in scale
    frontier = ET.fromstring(plots.frontier_svg(report)).get("aria-label")
    best = max(
        p.retained
        for p in report.frontier
        if p.of == "release" and p.partners_retained >= report.partners_keep
    )
    assert f"Release: best that counts {100 * best:.1f}%." in frontier


def test_mixtures_below_the_required_share_do_not_count():
    report = build_report(control=False)
    poor = [p.model_copy(update={"partners_retained": 0.9}) for p in report.frontier]
    stricter = report.model_copy(update={"frontier": poor})
    assert "nothing that counts" in plots.frontier_svg(stricter)
    looser = plots.frontier_svg(stricter.model_copy(update={"partners_keep": 0.85}))
    assert "admissible from 85%" in looser
    assert "best that counts" in looser


@pytest.mark.parametrize("draw", FIGURES)
def test_hostile_names_come_out_as_short_plain_words(draw):
    report = build_report(name=HOSTILE)
    points = [p.model_copy(update={"attack": HOSTILE}) for p in report.frontier]
    svg = draw(report.model_copy(update={"frontier": points}))
    assert "<script" not in svg
    assert "\u202e" not in svg
    assert "A" * 60 not in svg
    ET.fromstring(svg)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_name_is_never_parsed_as_mathematics(suffix, tmp_path):
    path = tmp_path / f"summary.{suffix}"
    plots.summary_figure(build_report(name="$\\frac{ $"), path)
    assert path.stat().st_size > 5000
    if suffix == "svg":
        assert "$\\frac{ $" in path.read_text()


def test_summary_is_a_picture_and_the_same_each_time(tmp_path):
    plots.summary_figure(build_report(), tmp_path / "a.png")
    plots.summary_figure(build_report(), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > 2 * picture.height


def test_summary_shows_retained_skill_by_tier(tmp_path):
    report = build_report()
    plots.summary_figure(report, tmp_path / "a.svg")
    words = re.findall(r"<text[^>]*>([^<]*)</text>", (tmp_path / "a.svg").read_text())
    for result in report.tiers.values():
        assert f"{100 * (1 - result.unmergeability):.0f}%" in words
        assert f"{100 * (1 - result.control_unmergeability):.0f}%" in words


def test_summary_refuses_what_it_cannot_write(tmp_path):
    with pytest.raises(UserError, match=r"neither \.png nor \.svg"):
        plots.summary_figure(build_report(), tmp_path / "a.pdf")
    for suffix in ("png", "svg"):
        with pytest.raises(UserError, match="cannot write"):
            plots.summary_figure(build_report(), tmp_path / "missing" / f"a.{suffix}")


def test_bare_records_still_draw(tmp_path):
    bare = build_report(control=False)
    release = bare.release.model_copy(update={"trained_range": None, "trained_band": None})
    update = {"release": release, "frontier": [], "scale_curve": [], "tiers": {}}
    bare = bare.model_copy(update=update)
    for draw in FIGURES:
        assert ET.fromstring(draw(bare)).tag.endswith("svg")
    plots.summary_figure(bare, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_users_matplotlib_is_left_alone():
    before = dict(matplotlib.rcParams)
    plots.scale_curve_svg(build_report())
    assert dict(matplotlib.rcParams) == before
    code = "import sys, trap2.reporting.plots; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_users_style_does_not_change_the_figure():
    plain = plots.scale_curve_svg(build_report())
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 30}):
        assert plots.scale_curve_svg(build_report()) == plain
