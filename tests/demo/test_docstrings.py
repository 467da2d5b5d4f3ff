"""The demo's text: balanced, disjoint, masked, repeatable; odd sources are skipped."""

import csv
from pathlib import Path

import pytest

from trap2.demo import docstrings
from trap2.demo.docstrings import (
    TASKS,
    Sentence,
    Sizes,
    draw_splits,
    labelled,
    library_folder,
    read_sentences,
    write_tasks,
)
from trap2.errors import UserError

LIBRARIES = ("matplotlib", "networkx", "pandas", "scipy", "sklearn")
SIZES = Sizes(train=24, validation=8, test=8)
FUNCTION = '''
def f{tag}(x):
    """Compute the {tag} quantity of the {library} object.

    A longer remark on the quantity {tag} in {library}.

    Parameters
    ----------
    x : array
        The values whose {tag} quantity is wanted, see :func:`~a.b`.

    Returns
    -------
    y : array
        An array that holds the {tag} quantity of `x`.

    References
    ----------
    .. [1] A. Author, "On the quantity {tag}", Journal of Things, vol. 3, 1999.
    """
'''


def word(number: int) -> str:
    """A word of its own for each number: digits do not tell texts apart."""
    return "".join(chr(ord("a") + int(digit)) for digit in f"{number:03d}")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five small stand-ins for the libraries, so that no test parses the real ones."""
    number = 0
    for library in LIBRARIES:
        folders = ("stats", "optimize", "signal", "linalg") if library == "scipy" else ("core",)
        for folder in folders:
            path = tmp_path / "site" / library / folder / "code.py"
            path.parent.mkdir(parents=True)
            numbers = range(number, number := number + 40)
            path.write_text("".join(FUNCTION.format(tag=word(n), library=library) for n in numbers))
    monkeypatch.setattr(docstrings, "library_folder", lambda name: tmp_path / "site" / name)
    return tmp_path


def rows(folder: Path, task: str, split: str) -> list[tuple[str, int]]:
    with (folder / task / f"{split}.csv").open(encoding="utf-8") as stream:
        return [(row["text"], int(row["label"])) for row in csv.DictReader(stream)]


def test_rows_are_balanced_disjoint_and_clean(installed: Path) -> None:
    tasks = write_tasks(installed / "out", 0, SIZES)
    assert list(tasks) == ["section", "library", "topic"]
    for name, task in tasks.items():
        assert len(task.classes) == len(task.descriptions)
        texts = []
        for split, size in SIZES._asdict().items():
            found = rows(installed / "out", name, split)
            labels = [label for _, label in found]
            assert len(found) == size
            assert {labels.count(c) for c in range(len(task.classes))} == {
                size // len(task.classes)
            }
            texts += [text for text, _ in found]
        assert len({text.lower() for text in texts}) == len(texts)
        for text in texts:
            assert text == " ".join(text.split())
            assert 6 <= len(text.split()) <= 20
            assert not set("`*_\n<>=") & set(text)


def test_the_seed_decides_everything(installed: Path) -> None:
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_tasks(installed / folder, seed, SIZES)
    for task in TASKS:
        for split in SIZES._fields:
            assert rows(installed / "a", task, split) == rows(installed / "b", task, split)
        assert rows(installed / "a", task, "train") != rows(installed / "c", task, "train")


def test_library_names_are_masked(installed: Path) -> None:
    write_tasks(installed / "out", 0, SIZES)
    for split in SIZES._fields:
        for text, _ in rows(installed / "out", "library", split):
            assert not any(name in text.lower() for name in LIBRARIES)
            assert "library" in text


def test_no_definition_gives_rows_to_two_splits() -> None:
    origins = {f"{word(n)} {part} text": f"scipy/a.py:{n}" for n in range(60) for part in "xy"}
    found = [
        (text, TASKS["section"].classes[i % 4], origin)
        for i, (text, origin) in enumerate(origins.items())
    ]
    splits = draw_splits(TASKS["section"], found, 0, Sizes(24, 8, 8))
    sources = [{origins[text] for text, _ in drawn} for drawn in splits.values()]
    assert len(set().union(*sources)) == sum(map(len, sources))


def test_a_text_under_two_labels_is_dropped() -> None:
    found = [("The Same, text 1.", "summary", "a"), ("the same text 2", "returns", "b")]
    with pytest.raises(UserError, match="found 0 test sentences of class 'summary'"):
        draw_splits(TASKS["section"], found, 0, Sizes(4, 4, 4))


def test_too_little_text_says_what_to_do(installed: Path) -> None:
    with pytest.raises(UserError, match=r"needs 1000: .*; ask for fewer rows or reinstall"):
        write_tasks(installed / "out", 0, Sizes(train=4000, validation=8, test=8))


def test_a_missing_library_says_what_to_install() -> None:
    with pytest.raises(UserError, match=r"not installed .* pip install 'trap2\[demo\]'"):
        library_folder("trap2_no_such_library")


def test_hostile_sources_are_skipped(tmp_path: Path) -> None:
    good = FUNCTION.format(tag="good", library="it")
    (tmp_path / "syntax.py").write_text("def f(:\n" + good)
    (tmp_path / "null.py").write_bytes(good.encode() + b"\0")
    (tmp_path / "bytes.py").write_bytes(good.encode() + b"x = '\xff'\n")
    (tmp_path / "codec.py").write_text("# -*- coding: no-such-codec -*-\n" + good)
    (tmp_path / "deep.py").write_text(good + "x = " + "(" * 5000 + ")" * 5000)
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "loop.py").symlink_to("loop.py")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(good)
    (tmp_path / "escape.py").write_text(good + "x = '\\d'\nraise SystemExit('executed')\n")
    found = list(read_sentences("it", tmp_path))
    assert {s.origin for s in found} == {"it/escape.py:fgood"}
    assert [s.section for s in found] == ["summary", "notes", "parameters", "returns", "references"]
    assert found[2].text == "The values whose good quantity is wanted, see a.b."


def test_code_is_no_text(tmp_path: Path) -> None:
    code = [
        'def f():\n    """>>> f() == [1, 2] and nothing at all besides\n"""',
        'def g():\n    """.. note:: a directive that is no sentence of prose\n"""',
        'def h():\n    """(1, 2, 3) or (4, 5, 6) are the shapes.\n"""',
        "x = '-----'",
    ]
    (tmp_path / "a.py").write_text("\n".join(code))
    assert list(read_sentences("it", tmp_path)) == []


def test_citations_are_no_topic() -> None:
    sentence = Sentence("On the F distribution.", "references", "scipy", "scipy/stats/a.py:f")
    assert labelled(TASKS["topic"], [sentence]) == []
    assert labelled(TASKS["topic"], [sentence._replace(section="notes")])[0][1] == "statistics"
