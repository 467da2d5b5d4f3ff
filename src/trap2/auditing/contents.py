"""What an evaluation depends on, by content: the key under which a ledger keeps its outputs.

Names of members and tasks are no part of it: the control of one audit may be a partner in another.
Two evaluations with the same key have the same outputs, on one machine to the bit.
"""

import ast
import hashlib
import inspect
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from importlib import import_module
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from trap2 import statistics
from trap2.attacks.attack import load_attacks
from trap2.attacks.tool import Tool
from trap2.auditing.mixture import Mixture, Split
from trap2.errors import UserError
from trap2.files import file_digest
from trap2.recipes import Precision
from trap2.tasks.data import Rows
from trap2.taskspec import TaskSpec
from trap2.update import Update

LIBRARIES = ("torch", "transformers", "tokenizers")
"""Another version of these may compute other bits."""

COMPUTES = ("trap2.attacks.live", "trap2.tasks.evaluate")
"""Our modules that every evaluation runs through; they and what they import is its code."""

UNDO = ("trap2.attacks.undo",)
"""What an update runs through that is brought into the base's basis."""

FOLLOWED = (
    *("trap2.attacks.", "trap2.tasks.evaluate", "trap2.tasks.evaluation", "trap2.tasks.model"),
    *("trap2.tasks.classes", "trap2.tasks.language"),
    *("trap2.tasks.harness", "trap2.tasks.own_function"),
    *("trap2.update", "trap2.checkpoint", "trap2.naming"),
)
REGISTRATION = "trap2.attacks.attack"
"""Our modules whose source is code that computes; registering, reading and checking computes
nothing, so that a new attack leaves the others' evaluations valid."""

TRAINS = ("trap2.auditing.recovery", "trap2.tasks.probe")
"""Our modules that attackers who train run through beside those."""
ELSEWHERE = (
    *("name", "data", "input", "label", "options", "limit", "classes", "lm_eval", "function"),
    *("descriptions", "temperature"),
)
"""Settings of a task that are in the key as what they give: rows, head, or what judges."""

HARNESS = ("lm_eval", "datasets", "jinja2")
TASK_FILES = (".yaml", ".yml", ".py")
"""What decides a task of lm-eval beside its rows: its version, and the files of a task folder."""

CONFIGS = ("*.json", "*.txt", "*.model")
"""Files of a base beside its weights that decide what it computes: configuration, tokenizer."""


Input: TypeAlias = tuple[str, str]
"""The place something is read from, and its digest."""


@dataclass(frozen=True)
class Content:
    """One evaluation by content.

    Attributes:
        text: Everything it depends on, as JSON in a fixed form.
        places: The digests of its inputs, by the place each was read from.
    """

    text: str
    places: dict[str, str]

    @cached_property
    def key(self) -> str:
        """SHA-256 of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass
class Contents:
    """Digests of everything that the evaluations of one arena depend on.

    Attributes:
        base: Folder of the base.
        base_digest: Digest of its weights.
        precision: Of the evaluations.
        recomputes: Whether batch-norm statistics of merges are worked out on unlabelled rows.
    """

    base: Path
    base_digest: str
    precision: Precision = "float32"
    recomputes: bool = False
    _inputs: dict[tuple[str, ...], Input] = field(default_factory=dict)

    def add(
        self,
        name: str,
        update: Update,
        task: TaskSpec,
        rows: Mapping[Split, Rows],
        unlabelled: int,
        undo: str | None = None,
    ) -> None:
        """Take in one member with its task, the rows of each split, and how many go without labels.

        Attacks that look at rows get that many of the validation rows, under the member's own head.
        An update that is brought into the base's basis first depends on how.
        """
        folder = update.folder
        place, parts = str(folder), [update.digest, _config(folder, "adapter_*")]
        if undo is not None:
            place, parts = f"{folder}, undone by {undo}", [*parts, undo, _sources(UNDO)]
        self._inputs["update", name] = place, _digest(parts)
        place = f"the head of {folder} for task '{task.name}'"
        self._inputs["head", name] = place, _head(update, task)
        for split, found in rows.items():
            place = f"the {split} rows of task '{task.name}'"
            self._inputs["rows", name, split] = place, _row_digest(found, task)
        seen = rows["validation"].first(unlabelled)
        place = f"the first {unlabelled} validation rows of task '{task.name}', unlabelled"
        self._inputs["unlabelled", name] = place, _row_digest(replace(seen, labels=[]), task)

    def of(self, mixture: Mixture, read: str, split: Split) -> Content:
        """What one evaluation depends on.

        Args:
            mixture: The merge.
            read: The member whose head and rows are used.
            split: Which of its rows.

        Raises:
            UserError: The attack's source cannot be read.
        """
        inputs = {
            "base": self._base,
            "code": _code(mixture.attack),
            "libraries": _libraries(),
            "head": self._inputs["head", read],
            "rows": self._inputs["rows", read, split],
        }
        attack = load_attacks().get(mixture.attack)
        if attack.tool is not None:
            inputs["tool"] = _tool(attack.tool)
        given = ["update", "head", "unlabelled"] if attack.needs_data else ["update"]
        if self.recomputes and not mixture.is_unchanged:
            given = [*dict.fromkeys([*given, "unlabelled"])]
            inputs["statistics"] = _statistics()
        members = [[self._inputs[kind, name] for kind in given] for name in mixture.members]
        content = {
            "attack": mixture.attack,
            "params": mixture.params,
            "precision": self.precision,
            "coefficients": mixture.coefficients,
            "members": [[digest for _, digest in member] for member in members],
            **{name: digest for name, (_, digest) in inputs.items()},
        }
        return Content(
            json.dumps(content, sort_keys=True), dict([*inputs.values(), *chain(*members)])
        )

    def taught(self, plain: Content, side: str, how: Mapping[str, Any]) -> Content:
        """What an evaluation depends on whose update was trained, or which is read by a probe.

        Args:
            plain: The same without that.
            side: The member whose labelled validation rows and head were learned from.
            how: What was done with how much, as JSON would have it.
        """
        inputs = {
            "taught_by": _training_code(),
            "taught_head": self._inputs["head", side],
            "taught_rows": self._inputs["rows", side, "validation"],
        }
        digests = {name: digest for name, (_, digest) in inputs.items()}
        content = {**json.loads(plain.text), **digests, "taught": dict(how)}
        places = {**plain.places, **dict(inputs.values())}
        return Content(json.dumps(content, sort_keys=True), places)

    def places(self, attacks: Iterable[str]) -> dict[str, str]:
        """The digest of every input of an audit with these attacks, by place."""
        named = [*attacks]
        codes = [_libraries(), _statistics(), _training_code(), *map(_code, named)]
        tools = (load_attacks().get(name).tool for name in named)
        codes += [_tool(tool) for tool in tools if tool is not None]
        return dict([self._base, *codes, *self._inputs.values()])

    @cached_property
    def _base(self) -> Input:
        configs = [_config(self.base, pattern) for pattern in CONFIGS]
        return str(self.base), _digest([self.base_digest, *configs])


def _digest(parts: Any) -> str:
    return "sha256:" + hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _config(folder: Path, pattern: str) -> dict[str, str]:
    """Digests of a folder's small files by name; how a release was made is said, not computed."""
    found = sorted(p for p in folder.glob(pattern) if p.suffix != ".safetensors" and p.is_file())
    return {path.name: file_digest(path) for path in found if path.name != "trap2.json"}


def _head(update: Update, task: TaskSpec) -> str:
    """Digest of a head: sentences and temperature if it is made of those, else its tensors."""
    if task.descriptions is not None:
        return _digest([task.descriptions, task.temperature])
    tensors = ((name, update.head[name]) for name in sorted(update.head))
    return _digest([[name, _tensor(value)] for name, value in tensors])


def _tensor(value: Tensor) -> list[Any]:
    plain = value.detach().float().contiguous().numpy()
    return [list(value.shape), hashlib.sha256(plain.tobytes()).hexdigest()]


def _row_digest(rows: Rows, task: TaskSpec) -> str:
    """Digest of rows in their order, as values or pixels, with the settings they are read by."""
    inputs = [_pixels(value) if hasattr(value, "tobytes") else value for value in rows.inputs]
    settings = task.model_dump(mode="json", exclude={*ELSEWHERE})
    return _digest([settings, len(task.classes), _judge(task), inputs, rows.labels])


def _judge(task: TaskSpec) -> list[Any]:
    """What scores a task beside our own code: a function by its module's source, or lm-eval."""
    if task.function is not None:
        module = sys.modules[task.function.__module__]
        try:
            return [task.function.__qualname__, inspect.getsource(module)]
        except (OSError, TypeError) as error:
            raise UserError(
                f"the function of task '{task.name}' was defined where its source cannot be read, "
                "so its evaluations cannot be recorded; define it in a file, or audit without a "
                "ledger"
            ) from error
    spec = task.lm_eval
    if spec is None:
        return []
    files = sorted(spec.folder.rglob("*")) if spec.folder else []
    own = [[path.name, file_digest(path)] for path in files if path.suffix in TASK_FILES]
    return [spec.task, spec.metric, [version(name) for name in HARNESS], own]


def _pixels(image: Any) -> list[Any]:
    return [image.mode, image.size, hashlib.sha256(image.tobytes()).hexdigest()]


@cache
def _libraries() -> Input:
    return "libraries", ", ".join(f"{name} {version(name)}" for name in LIBRARIES)


def _tool(tool: Tool) -> Input:
    return f"the version of {tool.name}", f"{tool.name} {tool.version()}"


@cache
def _statistics() -> Input:
    return "the code of running statistics", _digest(inspect.getsource(statistics))


@cache
def _code(attack: str) -> Input:
    """Digest of the source of an attack's module, and of all of ours that it computes with."""
    try:
        sources = _sources((load_attacks().get(attack).function.__module__, *COMPUTES))
    except (OSError, TypeError) as error:
        raise UserError(
            f"attack '{attack}' was defined where its source cannot be read, so its "
            "evaluations cannot be recorded; define it in a file, or audit without a ledger"
        ) from error
    return f"the code of attack '{attack}'", _digest(sources)


@cache
def _training_code() -> Input:
    """The same for attackers who train."""
    return "the code of attackers who train", _digest(_sources((*TRAINS, *COMPUTES)))


def _sources(modules: Iterable[str]) -> dict[str, str]:
    """The source of modules, and of all of ours that they compute with, by name."""
    waiting, sources = [*modules], dict[str, str]()
    while waiting:
        name = waiting.pop()
        if name in sources:
            continue
        sources[name] = inspect.getsource(import_module(name))
        imports = (n for n in ast.walk(ast.parse(sources[name])) if isinstance(n, ast.ImportFrom))
        imported = (node.module or "" for node in imports)
        waiting += [m for m in imported if m.startswith(FOLLOWED) and m != REGISTRATION]
    return sources
