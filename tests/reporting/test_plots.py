import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from itertools import pairwise

import matplotlib
import pytest
from PIL import Image
from samples import HOSTILE, build_report, with_intervals

from trap2.errors import UserError
from trap2.reporting import plots
from trap2.schema import FrontierPoint

ON_PAGE = [name for name in plots.FIGURES if name != "summary"]
SVG = "{http://www.w3.org/2000/svg}"


def draw(name, report, page=True):
    return plots.svg(plots.FIGURES[name](report), page)


def mixtures(report):
    """The report with mixtures of named models, as an audit records them."""
    points = [
        FrontierPoint(
            attack="task_arithmetic",
            params={side: c, "sst2": 0.4, "subj": 0.2},
            retained=c,
            partners_retained=1.0 if c < 0.7 else 0.8,
            of=side,
        )
        for side in ("release", "control")
        for c in (0.0, 0.3, 0.6, 0.9)
    ]
    return report.model_copy(update={"frontier": points})


def described(svg):
    root = ET.fromstring(svg)
    title, desc = root.find(SVG + "title"), root.find(SVG + "desc")
    assert root.get("aria-labelledby").split() == [title.get("id"), desc.get("id")]
    return title.text, desc.text


def ids(svg):
    return set(re.findall(r'\sid="([^"]+)"', svg))


def words(svg):
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


@pytest.fixture(params=list(plots.FIGURES))
def name(request):
    return request.param


def test_one_whole_svg_element_with_title_and_description(name):
    svg = draw(name, mixtures(build_report()))
    root = ET.fromstring(svg)
    assert svg.startswith("<svg")
    assert root.tag == SVG + "svg"
    assert root.get("role") == "img"
    title, desc = described(svg)
    assert title
    assert any(sign in desc for sign in ("%", "at scale"))
    assert not re.search(r"<(script|image|foreignObject|metadata)", svg)


def test_same_record_same_bytes(name):
    report = mixtures(with_intervals(build_report()))
    assert draw(name, report) == draw(name, report)


def test_ids_of_figures_on_one_page_differ_and_resolve():
    drawn = [draw(name, mixtures(build_report())) for name in ON_PAGE]
    used = [name for svg in drawn for name in ids(svg)]
    assert len(used) == len(set(used))
    for svg in drawn:
        links = re.findall(r'(?:url\(#|href="#)([^")]+)', svg)
        assert links
        assert set(links) <= ids(svg)


def test_style_rules_stay_inside_their_figure(name):
    for rules in re.findall(r"<style[^>]*>([^<]*)", draw(name, mixtures(build_report()))):
        assert rules.startswith(f"#figure-{name} *")


def test_in_a_page_colours_are_the_pages_and_in_a_file_they_are_fixed():
    page, file = (draw("accuracy", build_report(), page) for page in (True, False))
    for colour, variable in {"#0072b2": "release", "#d55e00": "control", "#1b1f24": "ink"}.items():
        assert f"var(--{variable}, {colour})" in page
        assert f": {colour}" not in page
        assert f": {colour}" in file
    assert "var(" not in file


def test_descriptions_carry_the_numbers():
    report = mixtures(build_report())
    _, accuracy = described(draw("accuracy", report))
    assert "Release (protected): 95.0% at scale 1, lowest 1.7% at scale 0.5." in accuracy
    _, loss = described(draw("loss", report))
    assert "Release (protected): 0.15 at scale 1, highest 2.95 at scale 0.5." in loss
    _, attacks = described(draw("attacks", report))
    assert "T3: release 41.2%, control 98.0%." in attacks
    _, relabelling = described(draw("relabelling", report))
    assert "release reaches 63.3% with 300 rows, from 2.6% as it answers." in relabelling
    _, frontier = described(draw("frontier", report))
    assert "Release: best that counts 60.0%." in frontier
    _, coefficients = described(draw("coefficients", report))
    assert "keeps 60.0%, with its own coefficient at 0.6 and the partners' at 0.3." in coefficients


def test_attacks_show_intervals_and_star_what_does_not_count():
    plain, certain = build_report(), with_intervals(build_report())
    assert len(draw("attacks", certain)) > len(draw("attacks", plain))
    assert words(draw("attacks", plain)).count("*") == 1
    fair = plain.model_copy(update={"attacks": plain.attacks[:-1]})
    assert "*" not in words(draw("attacks", fair))


def test_recovery_has_a_panel_and_words_for_each_method():
    report = build_report()
    title, said = described(draw("recovery", report))
    assert title == "Accuracy of attackers who train, by budget"
    assert "probe, 100 rows and 0 steps: 72.0%, 70.0% without the release, 91.0% with the c" in said
    shown = words(draw("recovery", report))
    assert [w for w in shown if w in ("probe", "finetune_after", "distil (reference)")] == [
        *("probe", "finetune_after", "distil (reference)")
    ]
    assert shown.count("labelled rows") == 1
    assert shown.count("training steps") == 2
    assert shown.count("*") == 1  # no merge of the probe counts
    longer = [
        point.model_copy(update={"budget_rows": rows, "budget_steps": steps})
        for point in report.recovery[1:]
        for rows in (30, 100)
        for steps in (30, 100)
    ]
    grown = report.model_copy(update={"recovery": longer})
    lines = plots.FIGURES["recovery"](grown).figure.axes[0].lines
    assert len(lines) == 3 * 2 + 1
    assert [list(line.get_xdata()) for line in lines[:6]] == [[30, 100]] * 6
    assert {line.get_markerfacecolor() for line in lines[:6:2]} == {"none"}


def test_mixtures_below_the_required_share_do_not_count():
    report = build_report(control=False)
    poor = [p.model_copy(update={"partners_retained": 0.9}) for p in report.frontier]
    stricter = report.model_copy(update={"frontier": poor})
    assert "nothing that counts" in draw("frontier", stricter)
    looser = draw("frontier", stricter.model_copy(update={"partners_keep": 0.85}))
    assert "admissible from 85%" in looser
    assert "best that counts" in looser
    nothing = mixtures(report).model_copy(update={"partners_keep": 1.0})
    poor = [p.model_copy(update={"partners_retained": 0.9}) for p in nothing.frontier]
    assert "no mixture counts" in draw(
        "coefficients", nothing.model_copy(update={"frontier": poor})
    )


def test_points_that_lie_close_are_drawn_with_room():
    report = build_report(control=False)
    flat = [p.model_copy(update={"loss": 1.7}) for p in report.scale_curve]
    near = [p.model_copy(update={"partners_retained": 0.96}) for p in report.frontier]
    tight = report.model_copy(update={"scale_curve": flat, "frontier": near})
    low, high = plots.FIGURES["loss"](tight).figure.axes[0].get_ylim()
    assert low == 0
    assert high > 1.8
    left, right = plots.FIGURES["frontier"](tight).figure.axes[0].get_xlim()
    assert left <= 0.9
    assert right >= 1.0


def test_of_very_many_mixtures_some_are_drawn_and_the_best_is_still_named():
    report = mixtures(build_report())
    common, best = report.frontier[1], report.frontier[2]
    many = report.model_copy(update={"frontier": [*[common] * 20_000, best]})
    for name in ("frontier", "coefficients"):
        svg = draw(name, many)
        assert len(svg) < 200_000
        assert "60.0%" in described(svg)[1]


def test_hostile_names_come_out_as_short_plain_words(name):
    report = mixtures(build_report(name=HOSTILE))
    points = [p.model_copy(update={"attack": HOSTILE}) for p in report.frontier]
    svg = draw(name, report.model_copy(update={"frontier": points}))
    assert "<script" not in svg
    assert "\u202e" not in svg
    assert "A" * 60 not in svg
    ET.fromstring(svg)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_name_is_never_parsed_as_mathematics(suffix, tmp_path):
    path = tmp_path / f"summary.{suffix}"
    plots.save(plots.summary(build_report(name="$\\frac{ $")), path)
    assert path.stat().st_size > 5000
    if suffix == "svg":
        assert "$\\frac{ $" in path.read_text()


def test_summary_is_a_picture_and_the_same_each_time(tmp_path):
    for name in ("a.png", "b.png"):
        plots.save(plots.summary(build_report()), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > 2 * picture.height


def test_every_tier_has_its_own_place_under_the_summary():
    report = build_report()
    tiers = report.tiers | dict.fromkeys(("T4", "T5"), report.tiers["T3"])
    figure = plots.summary(report.model_copy(update={"tiers": tiers})).figure
    figure.draw_without_rendering()
    labels = figure.axes[1].get_xticklabels()
    assert [label.get_text()[:2] for label in labels] == ["T1", "T2", "T3", "T4", "T5"]
    boxes = [label.get_window_extent() for label in labels]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
    legend = figure.axes[1].get_legend().get_window_extent()
    assert all(box.y0 > legend.y1 for box in boxes)


@pytest.mark.parametrize("report", [build_report(), with_intervals(build_report())])
def test_summary_shows_retained_skill_by_tier(report):
    shown = words(draw("summary", report))
    for result in report.tiers.values():
        assert f"{100 * (1 - result.unmergeability):.0f}%" in shown
        assert f"{100 * (1 - result.control_unmergeability):.0f}%" in shown


def test_what_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"neither \.png nor \.svg"):
        plots.save(plots.summary(build_report()), tmp_path / "a.pdf")
    for suffix in ("png", "svg"):
        with pytest.raises(UserError, match="cannot write"):
            plots.save(plots.summary(build_report()), tmp_path / "missing" / f"a.{suffix}")


def test_a_record_that_holds_nothing_gives_no_figure_and_still_a_summary(tmp_path):
    bare = build_report(control=False)
    release = bare.release.model_copy(update={"trained_range": None, "trained_band": None})
    update = {"release": release, "frontier": [], "scale_curve": [], "tiers": {}, "attacks": []}
    update["recovery"] = []
    bare = bare.model_copy(update=update)
    assert [plots.FIGURES[name](bare) for name in ON_PAGE] == [None] * len(ON_PAGE)
    plots.save(plots.summary(bare), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_control_there_is_one_side():
    report = build_report(control=False)
    for name in ("attacks", "accuracy", "relabelling", "frontier", "recovery", "summary"):
        shown = " ".join(words(draw(name, report)))
        assert "release" in shown
        assert "control" not in shown
    unnamed = build_report()  # its mixtures do not say which coefficient is whose
    assert plots.FIGURES["coefficients"](unnamed) is None
    bare = report.references.model_copy(update={"relabelled": []})
    assert "base model" not in words(
        draw("relabelling", report.model_copy(update={"references": bare}))
    )


def test_the_users_matplotlib_is_left_alone():
    before = dict(matplotlib.rcParams)
    draw("accuracy", build_report())
    assert dict(matplotlib.rcParams) == before
    code = "import sys, trap2.reporting.plots; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_users_style_does_not_change_the_figure():
    plain = draw("accuracy", build_report())
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 30}):
        assert draw("accuracy", build_report()) == plain
