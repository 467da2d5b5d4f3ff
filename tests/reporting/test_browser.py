"""The pages in a real browser: quiet, offline, sortable, filterable, and usable without a mouse."""

import functools
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from samples import HOSTILE, build_report, with_intervals

from reporting import browser
from trap2.reporting import html
from trap2.reporting.words import NONE
from trap2.schema import Report

COMMAND = browser.find()
pytestmark = pytest.mark.skipif(
    COMMAND is None, reason="no Chromium here; set TRAP2_BROWSER or put one on the path"
)

WIDE, NARROW = 1100, 360
ATTACKS = "#attack-table"


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser.launched(COMMAND, tmp_path_factory.mktemp("profile")) as running:
        yield running.tab()


@functools.cache
def rendered(*records: str) -> str:
    reports = [Report.model_validate_json(record) for record in records]
    if len(reports) == 1:
        return html.render(reports[0])
    return html.render_comparison([(f"{n}/report.json", r) for n, r in enumerate(reports)])


@pytest.fixture
def show(tab, tmp_path):
    """Opens the page of a report, or of several side by side."""

    def open_page(*reports: Report, width: int = WIDE, scheme: str = "light", media: str = ""):
        page = tmp_path / "page.html"
        page.write_text(rendered(*(r.model_dump_json() for r in reports)), encoding="utf-8")
        tab.look(width, scheme=scheme, media=media)
        tab.open(page)
        return tab

    yield open_page
    tab("setScriptExecutionDisabled", "Emulation", value=False)


def column(tab, number: int, table: str = ATTACKS) -> list[str]:
    """One column as it is seen, from top to bottom."""
    return tab.run(
        f"[...document.querySelectorAll('{table} tbody tr')].filter(r => !r.hidden)"
        f".map(r => r.cells[{number}].textContent.trim())"
    )


def focus_header(tab, number: int, table: str = ATTACKS) -> None:
    tab.run(f"document.querySelectorAll('{table} thead button')[{number}].focus()")


def sorts(tab, table: str = ATTACKS) -> list[str]:
    return tab.run(f"[...document.querySelectorAll('{table} thead th')].map(h => h.ariaSort ?? '')")


@pytest.mark.parametrize("name", ["trec6-protected", HOSTILE])
@pytest.mark.parametrize("several", [False, True])
def test_a_page_is_quiet_offline_and_shows_the_verdict(show, name, several):
    report = with_intervals(build_report(name=name, partners={name: 0.9}))
    tab = show(report, *[report] * several)
    assert tab.complaints == []
    assert tab.requests == []
    assert "holds against T1 and T2" in tab.run("document.body.innerText")
    assert tab.run("document.scripts.length") == 1
    assert tab.run("document.images.length") == 0
    assert tab.run("document.querySelectorAll('button').length") > 10  # the script ran


def test_hostile_names_are_text(show):
    tab = show(build_report(name=HOSTILE, partners={HOSTILE: 0.9}))
    assert tab.run("document.querySelector('h1 bdi').textContent").startswith(
        '<script>alert(1)</script>"><img src=x'
    )
    whole = tab.run("document.documentElement.textContent")
    assert "\u202e" not in whole
    assert "\x1b" not in whole
    assert "A" * 101 not in whole


def test_the_policy_stops_what_the_page_did_not_bring(show, tab, tmp_path):
    """A loopback server counts: the browser could reach it, the page's policy does not let it."""
    asked = []

    class Counter(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Counter)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place = f"http://127.0.0.1:{server.server_port}"
    added = f"<img src='{place}/image'><script src='{place}/script'></script>"
    added += f"<script>window.ran = 1; fetch('{place}/fetch')</script>"
    show(build_report())
    whole = (tmp_path / "page.html").read_text(encoding="utf-8")
    for policy in (True, False):
        page = whole if policy else whole.replace("Content-Security-Policy", "X-No-Policy")
        (tmp_path / "more.html").write_text(page.replace("</main>", added + "</main>"))
        tab.open(tmp_path / "more.html")
        assert tab.run("window.ran === 1") is not policy
        assert bool(asked) is not policy
        assert bool(tab.complaints) or not policy
    server.shutdown()


def test_numbers_sort_by_size_with_the_mouse(show):
    tab = show(with_intervals(build_report()))
    before = column(tab, 3)
    tab.run(f"document.querySelectorAll('{ATTACKS} thead button')[3].click()")
    assert sorts(tab)[:5] == ["", "", "", "ascending", ""]
    found = [float(cell.lstrip("*").split("%")[0]) for cell in column(tab, 3)]
    assert found == sorted(found)
    assert sorted(column(tab, 3)) == sorted(before)
    tab.run(f"document.querySelectorAll('{ATTACKS} thead button')[3].click()")
    assert sorts(tab)[3] == "descending"
    assert column(tab, 3)[0].startswith("*99.1%")


def test_words_sort_and_gaps_come_last_with_the_keyboard(show):
    tab = show(build_report())
    focus_header(tab, 0)
    tab.press("Enter")
    assert column(tab, 0) == sorted(column(tab, 0))
    tab.press(" ")
    assert column(tab, 0) == sorted(column(tab, 0), reverse=True)
    assert sorts(tab)[0] == "descending"
    focus_header(tab, 2)
    tab.press("Enter")
    assert column(tab, 2) == ["30", *["300"] * 4, NONE, NONE]
    tab.press("Enter")
    assert column(tab, 2) == [*["300"] * 4, "30", NONE, NONE]
    assert sorts(tab)[:3] == ["", "", "descending"]


def test_attacks_are_filtered_by_words_and_tiers(show):
    tab = show(build_report())
    shown = "document.querySelector('form output').textContent"
    assert tab.run(shown) == "7 of 7 shown"
    tab.run("document.querySelector('form [type=search]').focus()")
    tab.type("TIES")
    assert column(tab, 0) == ["ties", "ties"]
    assert tab.run(shown) == "2 of 7 shown"
    for _ in range(2):
        tab.press("Tab")
    assert tab.run("document.activeElement.value") == "T2"
    tab.press(" ")
    assert column(tab, 1) == ["T1"]
    tab.press(" ")
    assert tab.run(shown) == "2 of 7 shown"


def test_long_tables_have_a_filter_each(show):
    few = build_report()
    tab = show(few)
    assert tab.run("document.querySelectorAll('form').length") == 1
    many = [
        point.model_copy(update={"budget_rows": rows})
        for point in few.recovery
        for rows in (30, 100, 300)
    ]
    tab = show(few.model_copy(update={"recovery": many}))
    tab.run("document.querySelector('[data-table=recovery-table] [type=search]').focus()")
    tab.type("dist")
    assert column(tab, 0, "#recovery-table") == ["distil (reference)"] * 3
    assert column(tab, 1, "#recovery-table") == ["30", "100", "300"]
    assert len(column(tab, 0)) == len(few.attacks)
    assert tab.complaints == []


def test_the_keyboard_reaches_the_content_and_shows_where_it_is(show):
    tab = show(build_report())
    tab.press("Tab")
    assert tab.run("document.activeElement.textContent") == "Skip to the results"
    assert tab.run("document.activeElement.getBoundingClientRect().left") >= 0
    tab.press("Enter")
    assert tab.run("location.hash") == "#main"
    seen = set()
    for _ in range(30):
        tab.press("Tab")
        seen.add(tab.run("document.activeElement.tagName"))
        style = "getComputedStyle(document.activeElement)"
        assert tab.run(f"{style}.outlineStyle") != "none", tab.run(
            "document.activeElement.outerHTML"
        )
    assert seen >= {"DIV", "SUMMARY", "INPUT", "BUTTON"}


@pytest.mark.parametrize("width", [NARROW, WIDE])
@pytest.mark.parametrize("name", ["trec6-protected", HOSTILE])
def test_nothing_is_wider_than_the_window_but_what_scrolls_in_its_own_box(show, width, name):
    for reports in ([build_report(name=name)], [build_report(name=name)] * 2):
        tab = show(*reports, width=width)
        assert tab.run("document.documentElement.scrollWidth <= innerWidth")


CONTRAST = """
(() => {
  const level = (c) => {
    const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const c = getComputedStyle(e).backgroundColor;
      if (!c.startsWith("rgba(0, 0, 0, 0")) return level(c);
    }
    throw "no ground";
  };
  const worst = {};
  for (const e of document.querySelectorAll("p, td, th, li, dt, dd, summary, figcaption, text")) {
    const style = getComputedStyle(e);
    const [a, b] = [level(e.tagName === "text" ? style.fill : style.color), ground(e)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    worst[e.tagName] = Math.min(worst[e.tagName] ?? 99, ratio);
  }
  return worst;
})()
"""


@pytest.mark.parametrize(("scheme", "media"), [("light", ""), ("dark", ""), ("dark", "print")])
def test_words_in_page_and_figures_stand_out_from_their_ground(show, scheme, media):
    tab = show(build_report(), scheme=scheme, media=media)
    worst = tab.run(CONTRAST)
    assert set(worst) >= {"P", "TD", "TH", "LI", "text"}
    assert min(worst.values()) >= 7, worst
    dark = tab.run("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    assert dark is (scheme == "dark" and not media)


def test_print_leaves_out_what_paper_cannot_do(show):
    tab = show(build_report(), media="print")
    assert tab.run("getComputedStyle(document.querySelector('form')).display") == "none"
    assert tab.run("getComputedStyle(document.querySelector('.scroll')).overflowX") == "visible"


def test_without_script_the_whole_table_is_there(show, tab):
    tab("setScriptExecutionDisabled", "Emulation", value=True)
    show(build_report())
    tab("setScriptExecutionDisabled", "Emulation", value=False)
    assert tab.run("document.querySelectorAll('button').length") == 0
    assert tab.run("document.querySelector('form').hidden") is True
    assert len(column(tab, 0)) == len(build_report().attacks)


def test_a_leaderboard_sorts_and_filters(show):
    names = ("beta", "alpha", "gamma", "delta")
    reports = [
        build_report().model_copy(
            update={"release": build_report().release.model_copy(update={"name": name})}
        )
        for name in names
    ]
    tab = show(*reports)
    board = "#leaderboard"
    assert column(tab, 0, board) == list(names)
    focus_header(tab, 0, board)
    tab.press("Enter")
    assert column(tab, 0, board) == sorted(names)
    tab.run("document.querySelector('form [type=search]').focus()")
    tab.type("LTA")
    assert column(tab, 0, board) == ["delta"]
