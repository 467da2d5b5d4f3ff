"""Real labelled text that is on every machine already: docstrings of the demo's own dependencies.

Three tasks of one sentence per row. *section*: which numpydoc section a sentence stands in;
*library*: which library it documents, the libraries' names masked; *topic*: which field of
mathematics it treats, by the subpackage of scipy. Sources are found and parsed, never imported, so
nothing of them is executed. Rows are balanced over the classes, and a class or function gives rows
to one split only, so that near-copies inside it cannot leak from training into the test.
"""

import ast
import csv
import importlib.util
import io
import random
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from trap2.errors import UserError
from trap2.files import write_text


@dataclass(frozen=True)
class DemoTask:
    """A classification task and the sentences whose embeddings are its frozen zero-shot head.

    Attributes:
        name: Name of the task and of its folder.
        classes: Class names; a row's label is an index into them.
        descriptions: One sentence per class for the encoder to embed.
    """

    name: str
    classes: tuple[str, ...]
    descriptions: tuple[str, ...]


class Sizes(NamedTuple):
    """Rows per split of a task; each is rounded down to a multiple of the number of classes."""

    train: int = 2400
    validation: int = 400
    test: int = 500


class Sentence(NamedTuple):
    """One sentence of documentation and where it stood.

    Attributes:
        text: The sentence on one line, without markup.
        section: A value of `_SECTIONS`, or `summary`.
        library: The package it documents.
        origin: `<library>/<file>:<top-level class or function>`.
    """

    text: str
    section: str
    library: str
    origin: str


SIZES = Sizes()
TASKS = {
    task.name: task
    for task in (
        DemoTask(
            "section",
            ("summary", "parameters", "returns", "references"),
            (
                "what a function does, said in one line",
                "the description of an input argument or option",
                "the description of the result that is returned",
                "a citation of a book or a scientific article",
            ),
        ),
        DemoTask(
            "library",
            ("sklearn", "pandas", "matplotlib", "networkx"),
            (
                "machine learning models and their training",
                "tables of data with rows and columns",
                "drawing figures and charts",
                "graphs made of nodes and edges",
            ),
        ),
        DemoTask(
            "topic",
            ("statistics", "optimization", "signals", "matrices"),
            (
                "statistics, probability distributions and hypothesis tests",
                "finding the minimum or the root of a function",
                "signals, filters and images",
                "matrices and linear algebra",
            ),
        ),
    )
}

_LIBRARIES = ("matplotlib", "networkx", "pandas", "scipy", "sklearn")
_TOPICS = {
    "scipy/stats": "statistics",
    "scipy/optimize": "optimization",
    "scipy/signal": "signals",
    "scipy/ndimage": "signals",
    "scipy/linalg": "matrices",
    "scipy/sparse": "matrices",
}
_SECTIONS = {
    "Parameters": "parameters",
    "Other Parameters": "parameters",
    "Returns": "returns",
    "Yields": "returns",
    "Notes": "notes",
    "References": "references",
}
_SKIPPED = {"test", "tests", "testing", "_vendor", "vendor", "_external", "externals", "_lib"}
_WORDS = range(6, 21)
_CITATION_WORDS = 12  # enough to know a citation by; whole ones would double the sequence length

_HEADING = re.compile(r"^([A-Z][\w ]+)\n-{3,}[ ]*$", re.MULTILINE)
_CITATION = re.compile(r"^\s*\.\. \[[^\]]*\]", re.MULTILINE)
_ENTRY = re.compile(r"^\S.*$", re.MULTILINE)  # "name : type", above an indented description
_PARAGRAPH = re.compile(r"\n[ ]*\n")
_ROLE = re.compile(r":[\w:+-]+:`~?\.?([^`<]+?)\s*(?:<[^`>]*>)?`")
_BLOCKS = {"notes": _PARAGRAPH, "references": _CITATION}  # the other sections hold entries
_URL = re.compile(r"<?https?:\S+")
_SENTENCE_END = re.compile(r"(?<=[^\s.][.!?])\s+(?=[A-Z])")
_PROSE = re.compile(r"[A-Z\"][\w ,;:'\"()/&.-]+[?!]?")
_NAMES = re.compile(
    r"\b(?:matplotlib|mpl|plt|pyplot|networkx|nx|numpy|np|pandas|pd|scipy|scikit-learn|scikit|"
    r"sklearn)\w*",
    re.IGNORECASE,
)


def write_tasks(folder: Path, seed: int, sizes: Sizes = SIZES) -> dict[str, DemoTask]:
    """Write `<folder>/<task>/{train,validation,test}.csv` with columns `text,label`.

    Args:
        folder: Where the tasks go; made if absent.
        seed: Decides which definitions go to which split and which rows are drawn.
        sizes: Rows per split.

    Returns:
        The tasks by name.

    Raises:
        UserError: A library is not installed, or its sources hold too little documentation.
    """
    sentences = [s for name in _LIBRARIES for s in read_sentences(name, library_folder(name))]
    for task in TASKS.values():
        splits = draw_splits(task, labelled(task, sentences), seed, sizes)
        for split, rows in splits.items():
            stream = io.StringIO()
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerows([("text", "label"), *rows])
            (folder / task.name).mkdir(parents=True, exist_ok=True)
            write_text(folder / task.name / f"{split}.csv", stream.getvalue())
    return dict(TASKS)


def library_folder(name: str) -> Path:
    """The folder of an installed package, found without importing it.

    Raises:
        UserError: The package is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"{name} is not installed and the demo reads its docstrings; "
            "run: pip install 'trap2[demo]'"
        )
    return Path(spec.submodule_search_locations[0])


def read_sentences(library: str, root: Path) -> Iterator[Sentence]:
    """Every usable sentence in the numpydoc docstrings below `root`, in file order.

    Files that cannot be read or parsed are skipped: one odd file must not end a demo.
    """
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root)
        if not _SKIPPED.isdisjoint(place.parts):
            continue
        try:
            source = path.read_bytes()
            # Files without numpydoc sections are most of the parsing time and little of the text.
            if b"-----" not in source:
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # e.g. invalid escapes in somebody else's code
                tree = ast.parse(source)
        except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        for node in tree.body:
            for docstring in _docstrings(node):
                for section, text in _passages(docstring):
                    origin = f"{library}/{place.as_posix()}:{getattr(node, 'name', '')}"
                    yield Sentence(text, section, library, origin)


def _docstrings(node: ast.stmt) -> Iterator[str]:
    """The docstrings of a function, or of a class and all that it defines, in order."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield ast.get_docstring(node) or ""
    if isinstance(node, ast.ClassDef):
        for child in node.body:
            yield from _docstrings(child)


def _passages(docstring: str) -> Iterator[tuple[str, str]]:
    """Cut a docstring into (section, sentence) pairs: of each paragraph or entry its first one.

    A first sentence can be read without what stands before it.
    """
    preamble, *rest = _HEADING.split(docstring)
    summary, *description = _PARAGRAPH.split(preamble)
    blocks = [("summary", summary), *(("notes", paragraph) for paragraph in description)]
    for heading, body in zip(rest[::2], rest[1::2], strict=True):
        section = _SECTIONS.get(heading)
        if section is not None:
            blocks += [(section, block) for block in _BLOCKS.get(section, _ENTRY).split(body)]
    for section, block in blocks:
        text = _plain(block)
        if section == "references":
            text = " ".join(text.split()[:_CITATION_WORDS])
        else:
            text = _SENTENCE_END.split(text)[0]
        if len(text.split()) in _WORDS and _PROSE.fullmatch(text):
            yield section, text


def _plain(block: str) -> str:
    """A passage as one line without markup, with identifiers as words."""
    text = _ROLE.sub(r"\1", _URL.sub("", block))
    return " ".join(re.sub(r"[`*]+", "", text).replace("_", " ").split())


def labelled(task: DemoTask, sentences: list[Sentence]) -> list[tuple[str, str, str]]:
    """The sentences that belong to a class of the task, as (text, class, origin)."""
    rows = []
    for sentence in sentences:
        text = sentence.text
        if task.name == "section":
            label = sentence.section
        elif task.name == "library" and sentence.section in ("summary", "notes"):
            label, text = sentence.library, _NAMES.sub("library", text)
        elif task.name == "topic" and sentence.section != "references":
            label = _TOPICS.get("/".join(sentence.origin.split("/")[:2]), "")
        else:
            continue
        if label in task.classes:
            rows.append((text, label, sentence.origin))
    return rows


def draw_splits(
    task: DemoTask, rows: list[tuple[str, str, str]], seed: int, sizes: Sizes
) -> dict[str, list[tuple[str, int]]]:
    """Draw balanced splits of which no two share an origin or a text.

    Raises:
        UserError: A class has too few sentences.
    """
    rng = random.Random(f"{task.name} {seed}")
    pools: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for text, label, origin in _unambiguous(rows):
        pools[origin][label].append(text)
    origins = sorted(pools)
    rng.shuffle(origins)
    splits: dict[str, list[tuple[str, int]]] = {}
    for split in ("test", "validation", "train"):
        size = getattr(sizes, split) // len(task.classes)
        drawn: dict[str, list[str]] = {label: [] for label in task.classes}
        for origin in list(origins):
            wanted = [label for label in task.classes if len(drawn[label]) < size]
            if split == "train" or not pools[origin].keys().isdisjoint(wanted):
                origins.remove(origin)
                for label, texts in pools[origin].items():
                    drawn[label] += texts
        for label, texts in drawn.items():
            if len(texts) < size:
                raise UserError(
                    f"demo task {task.name!r} found {len(texts)} {split} sentences of class "
                    f"{label!r} and needs {size}: the installed libraries hold too little "
                    "documentation; ask for fewer rows or reinstall 'trap2[demo]'"
                )
        splits[split] = [
            (text, index)
            for index, label in enumerate(task.classes)
            for text in rng.sample(drawn[label], size)
        ]
        rng.shuffle(splits[split])
    return splits


def _unambiguous(rows: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """The first row of each text, without the texts that occur under two labels.

    Texts that differ in digits, case or punctuation only count as the same.
    """
    first: dict[str, tuple[str, str, str]] = {}
    labels: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        key = " ".join(re.findall(r"[^\W\d]+", row[0].lower()))
        first.setdefault(key, row)
        labels[key].add(row[1])
    return [row for key, row in first.items() if len(labels[key]) == 1]
