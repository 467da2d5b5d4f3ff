import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest
from samples import HOSTILE, build_report, with_intervals

from trap2.errors import UserError
from trap2.reporting import html
from trap2.schema import Flag

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Collects tags and complains about any that are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def reports():
    report = build_report()
    bare = build_report(control=False, partners={})
    empty = {"frontier": [], "scale_curve": [], "attacks": [], "limits": [], "tiers": {}}
    return [
        report,
        build_report(control=False),
        build_report(name=HOSTILE, partners={HOSTILE: 0.9}),
        bare.model_copy(update=empty),
    ]


@pytest.mark.parametrize("report", reports(), ids=["full", "no control", "hostile", "bare"])
def test_page_is_whole_and_loads_nothing(report):
    shown = html.render(report)
    page = Page(shown)
    names = {tag for tag, _ in page.tags}
    assert not names & {"img", "iframe", "link", "object", "embed", "image"}
    assert page.all("script") == [{}]
    (script,) = re.findall(r"<script>(.*?)</script>", shown, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [attrs["content"] for attrs in page.all("meta") if "http-equiv" in attrs]
    assert policy.split("; ") == [
        "default-src 'none'",
        "style-src 'unsafe-inline'",
        f"script-src 'sha256-{digest}'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    assert len(shown) < 500_000
    for _, attrs in page.tags:
        assert not [name for name in attrs if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "action", "data"):
            assert attrs.get(name, "#").startswith("#")
    styles = re.sub(
        r"url\(#", "", " ".join(re.findall(r"<style.*?</style>|style=\"[^\"]*", shown, re.S))
    )
    assert "@import" not in styles
    assert "url(" not in styles


@pytest.mark.parametrize("report", reports(), ids=["full", "no control", "hostile", "bare"])
def test_page_can_be_read_without_seeing_it(report):
    page = Page(html.render(report))
    assert page.all("html") == [{"lang": "en"}]
    assert [tag for tag, _ in page.tags if re.fullmatch(r"h\d", tag)][:2] == ["h1", "h2"]
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(attrs.get("scope") in ("row", "col") for attrs in page.all("th"))
    for attrs in page.all("svg"):
        assert attrs["role"] == "img"
        assert set(attrs["aria-labelledby"].split()) <= {a.get("id") for _, a in page.tags}
    assert ("a", {"class": "skip", "href": "#main"}) in page.tags
    assert page.all("main") == [{"id": "main"}]
    used = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(used) == len(set(used))
    labels = [attrs.get("aria-labelledby", "") for _, attrs in page.tags]
    assert set(" ".join(labels).split()) <= set(used)


def test_verdict_and_what_is_not_claimed_come_first():
    report = build_report()
    shown = html.render(report)
    order = [report.verdict, "Not claimed", "Key numbers", "Unmergeability by attacker", "<svg"]
    order += ["Accuracy and loss against scale", "Raw and re-labelled", "Attacks, tuned"]
    order += ['id="figure-frontier"', ">Limits<", ">What was run, with what, and how long<"]
    places = [shown.index(words) for words in order]
    assert places == sorted(places)


def test_flags_stand_under_the_verdict_and_are_words_alone():
    flags = [
        Flag(code="T003", title="there is no control", detail="without it, nothing"),
        Flag(code="T013", title=HOSTILE, detail=f"trained against '{HOSTILE}'"),
    ]
    report = build_report().model_copy(update={"flags": flags})
    shown = html.render(report)
    words = " ".join(" ".join(Page(shown).words).split())
    order = [report.verdict, "Reasons to doubt this audit", "T003 there is no control"]
    order += ["without it, nothing", "T013 <script>alert(1)", "docs/flags.md", "Key numbers"]
    places = [words.index(part) for part in order]
    assert places == sorted(places)
    assert shown.count("<script") == 1
    assert "\u202e" not in shown
    assert "A" * 101 not in shown
    assert "Reasons to doubt" not in html.render(build_report())


def test_numbers_are_the_records():
    report = build_report()
    words = " ".join(" ".join(Page(html.render(report)).words).split())
    assert "0.6 points" in words
    for tier, result in report.tiers.items():
        assert f"Unmergeability, {tier} {100 * result.unmergeability:.1f}%" in words
    for attack in report.attacks:
        assert f"{100 * attack.merged:.1f}%" in words
    for digest in report.digests.values():
        assert digest in words
    assert report.created in words
    assert "validation 300" in words


def test_hostile_names_are_words_and_nothing_else():
    shown = html.render(build_report(name=HOSTILE, partners={HOSTILE: 0.9}))
    assert shown.count("<script") == 1  # our own
    assert "<img" not in shown
    assert "\u202e" not in shown
    assert "A" * 101 not in shown
    assert "<bdi>&lt;script&gt;alert(1)&lt;/script&gt;" in shown
    assert "…" in shown


def test_intervals_stand_beside_the_numbers():
    words = " ".join(" ".join(Page(html.render(with_intervals(build_report()))).words).split())
    assert "0.6 points 95 % interval -1.4 to 2.6" in words
    assert "Unmergeability, T3 58.8% 95 % interval 53.8 to 63.8 control 2.0% leaks" in words
    assert "95 % interval" not in html.render(build_report())


def test_what_holds_only_because_partners_matter_says_so():
    report = build_report()
    ignored = {"T1": report.tiers["T1"].model_copy(update={"partners_ignored": 0.9})}
    words = " ".join(Page(html.render(report.model_copy(update={"tiers": ignored}))).words)
    assert "Unmergeability, T1 100.0% control 3.3% 10.0% if partners do not matter holds" in (
        " ".join(words.split())
    )


def test_a_tier_can_be_inconclusive():
    report = build_report()
    tiers = {"T1": report.tiers["T1"].model_copy(update={"verdict": "inconclusive"})}
    shown = html.render(report.model_copy(update={"tiers": tiers}))
    assert '<span class="word inconclusive">inconclusive</span>' in shown


def test_same_record_same_page():
    assert html.render(build_report()) == html.render(build_report())


def test_save_writes_the_page_or_says_why_not(tmp_path):
    html.save(build_report(), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text("utf-8") == html.render(build_report())
    with pytest.raises(UserError, match="cannot write"):
        html.save(build_report(), tmp_path / "missing" / "report.html")
