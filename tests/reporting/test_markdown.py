from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt
from samples import HOSTILE, build_report

from trap2.reporting import markdown, tables
from trap2.schema import Flag


def rendered(report):
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown.render(report))


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.words = set(), ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        assert not attrs or {name for name, _ in attrs} == {"style"}

    def handle_data(self, data):
        self.words += data

    def handle_comment(self, data):
        raise AssertionError(data)


HARMLESS = {"h1", "h2", "p", "ul", "li", "code", "table", "thead", "tbody", "tr", "th", "td"}


@pytest.mark.parametrize("name", ["trec6-protected", HOSTILE, "<!-- x --> ![a](b) # 1. - `"])
def test_markdown_is_words_and_tables_whatever_the_names(name):
    flags = [Flag(code="T003", title=name, detail=name)]
    report = build_report(name=name, partners={name: 0.9}).model_copy(update={"flags": flags})
    page = Tags(rendered(report))
    assert page.tags == HARMLESS
    assert "58.8%" in page.words
    assert "\u202e" not in page.words


def test_markdown_says_what_was_found_its_limits_and_how_to_repeat_it():
    report = build_report()
    words = Tags(rendered(report)).words
    parts = [
        "Merging audit of trec6-protected",
        report.verdict,
        "58.8%",
        "Utility cost: 0.6 points",
    ]
    parts += ["Utility cost: 0.6 points", "Limits", tables.not_claimed(report), *report.limits]
    parts += ["sha256:" + "ab" * 32]
    parts += ["merged with sst2, agnews, subj", "tuned on 300 validation rows", "on 500 test rows"]
    parts += ["trap2 audit audit.yaml"]
    places = [words.index(part) for part in parts]
    assert places == sorted(places)
    assert "Reasons to doubt" not in words
    said = "It works. T1 holds: 0 %. T3 leaks: 41 %."
    shown = markdown.render(report.model_copy(update={"verdict": said}))
    assert "- It works.\n- T1 holds: 0 %.\n- T3 leaks: 41 %.\n" in shown
    assert "Unmergeability by attacker:\n\n| tier |" in shown
    assert "unmergeability = 1 - the largest share of the skill" in shown


def test_tables_keep_their_shape():
    for name in ("trec6-protected", HOSTILE):
        report = build_report(name=name)
        shown = markdown.piped(tables.attack_table(report))
        bars = {line.replace("\\|", "").count("|") for line in shown.splitlines()}
        assert len(bars) == 1
