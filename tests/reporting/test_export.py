import subprocess
import sys

import pytest
from PIL import Image
from samples import build_report

from trap2.errors import UserError
from trap2.reporting import html, markdown, spreadsheet
from trap2.reporting.export import FORMATS, export


@pytest.mark.parametrize(("suffix", "render"), [("html", html), ("md", markdown)])
def test_text_formats_are_what_their_modules_render(tmp_path, suffix, render):
    report = build_report()
    export(report, tmp_path / f"a.{suffix}")
    assert (tmp_path / f"a.{suffix}").read_text(encoding="utf-8") == render.render(report)


def test_csv_and_figures_are_written(tmp_path):
    report = build_report()
    export(report, tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text(encoding="utf-8") == spreadsheet.render(report)
    export(report, tmp_path / "a.png", "attacks")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.format == "PNG"
    export(report, tmp_path / "a.svg", "frontier")
    assert "figure-frontier" in (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert {p.suffix for p in tmp_path.iterdir()} == {".csv", ".png", ".svg"}


def test_what_cannot_be_drawn_is_refused_with_what_can(tmp_path):
    report = build_report()
    with pytest.raises(UserError, match=r"a\.pdf has no suffix that says a format; end it in"):
        export(report, tmp_path / "a.pdf")
    wanted = "no figure is called 'pie'; choose from summary, accuracy, loss, attacks, "
    with pytest.raises(UserError, match=wanted):
        export(report, tmp_path / "a.svg", "pie")
    bare = report.model_copy(update={"frontier": []})
    with pytest.raises(UserError, match="holds nothing for the figure 'frontier'; choose another"):
        export(bare, tmp_path / "a.svg", "frontier")
    assert list(tmp_path.iterdir()) == []
    assert FORMATS == (".html", ".md", ".csv", ".svg", ".png")


def test_words_and_numbers_need_neither_matplotlib_nor_jinja():
    code = (
        "import sys; from trap2.reporting import comparison, export, model_card; "
        "assert not {'matplotlib', 'jinja2', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
