"""What people write in YAML: recipes (`trap2 protect`, `trap2 surrogates`) and audits, validated.

Unknown keys, wrong types and values out of range end in one line that names the key, the reason
and the remedy. Relative paths are relative to the file they stand in.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    Field,
    FiniteFloat,
    ValidationError,
    model_validator,
)

from trap2.errors import UserError
from trap2.registry import did_you_mean
from trap2.schema import Thresholds
from trap2.suites import QUICK, SUITES, suite
from trap2.taskspec import DataSpec, Settings
from trap2.taskspec import TaskSpec as TaskSpec

SEARCH = {"t3_search": ["descent"]}
"""What every suite fixes beside its own settings: how T3 searches in all of them so far."""

Precision: TypeAlias = Literal["float32", "bfloat16"]


class LoraSpec(Settings):
    """Shape of the adapter."""

    r: int = Field(16, ge=1)
    alpha: float = Field(32, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: str | list[str] = "all-linear"
    rslora: bool = False
    dora: bool = False


class TrainingSpec(Settings):
    """The fine-tuning itself; the same for a release and for its control."""

    steps: int = Field(600, ge=1)
    batch_size: int = Field(32, ge=1)
    gradient_accumulation: int = Field(1, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    lr_warmup_steps: int = Field(20, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    gradient_checkpointing: bool = False
    precision: Precision = Field(
        "float32", description="bfloat16: mixed precision, weights and optimizer in float32"
    )
    evaluate_every: int = Field(100, ge=1, description="steps between checkpoints")
    batch_by_length: bool = Field(True, description="batches of like length: less padding")


class Recipe(Settings):
    """One fine-tuning run and the release it makes."""

    base: str = Field(description="local folder or Hub id")
    task: TaskSpec
    method: Literal["lora", "full"] = "lora"
    lora: LoraSpec = LoraSpec()
    training: TrainingSpec = TrainingSpec()
    trap2: dict[str, float | int | str] = Field(
        default_factory=dict, description="fields of Trap2Config; strength: 0 makes a control"
    )
    seed: int = Field(0, ge=0)


class BankRecipe(Settings):
    """A bank of surrogates: short plain fine-tunes of a base, as merge partners in training."""

    base: str = Field(description="local folder or Hub id")
    texts: DataSpec | None = Field(None, description="unlabelled rows; only train is read")
    kinds: list[Literal["clusters", "words", "shuffled"]] = Field(
        ["clusters", "words", "shuffled"], description="pseudo-tasks made from the texts"
    )
    tasks: list[TaskSpec] = Field([], description="labelled sets of your own")
    count: int = Field(6, ge=1, description="fine-tunes, in turn over kinds and tasks")
    rows: int = Field(2000, ge=1, description="texts used at most")
    max_length: int = Field(48, gt=1, description="tokens kept of each text")
    training: TrainingSpec = TrainingSpec(steps=200, evaluate_every=200)
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _has_rows(self) -> "BankRecipe":
        if not (self.tasks or (self.texts and self.kinds)):
            raise ValueError("no rows to train on; give texts, with kinds, or tasks")
        names = [*self.kinds, *(task.name for task in self.tasks)]
        if len(dict.fromkeys(names)) != len(names):
            raise ValueError(f"kinds and task names must differ, got {', '.join(names)}")
        return self


class ReleaseSpec(Settings):
    """A released folder and the task it was made for."""

    path: Path
    task: TaskSpec


class AttackerSpec(Settings):
    """What the attacker may spend: a suite, or a choice of one's own; without either, `quick`.

    A choice of one's own is any setting that a suite fixes.
    """

    suite: str | None = Field(None, description=f"a frozen attacker: {', '.join(SUITES)}")
    attacks: list[str] = Field(["task_arithmetic", "ties", "dare_ties", "slerp"])
    coefficients: list[float] | dict[str, list[float]] | None = Field(
        None, description="shared coefficients tried in T1 and T2, for all attacks or by attack"
    )
    grids: dict[str, dict[str, list[float]]] = Field(
        default_factory=dict, description="values of an attack's own parameters"
    )
    t3_attacks: list[str] = Field(["task_arithmetic"])
    t3_values: list[float] = Field([0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2], min_length=2)
    t3_starts: list[float] = Field(
        [0.2, 0.4, 0.6, 0.8], description="coefficients of the partners beside the release at 1"
    )
    t3_sweeps: int = Field(1, ge=1, description="passes of coordinate descent")
    t3_search: list[Literal["descent", "cma"]] = Field(
        ["descent"], min_length=1, description="coordinate descent, and then CMA-ES"
    )
    t3_evolved: int = Field(200, ge=10, description="mixtures that CMA-ES tries of each attack")
    refine: int = Field(
        2, ge=0, description="rounds of looking halfway between the best mixtures and others"
    )
    budget: int | None = Field(
        None, ge=1, description="mixtures tried at most for each attack on each side"
    )
    undo: str | None = Field(
        None, description="bring every release into the base's basis first: nearest, anchor_guided"
    )
    relabel_rows: list[Annotated[int, Field(ge=2)]] = Field([30, 300])
    data_attacks: list[str] = Field([], description="tier T4: attacks on unlabelled rows")
    unlabelled_rows: int = Field(100, ge=2, description="validation rows of every task, for T4")
    recovery: list[Literal["probe", "finetune_before", "finetune_after", "distil"]] = Field(
        [], description="tier T5: attacks that train on labelled rows; distil is their reference"
    )
    recovery_rows: list[Annotated[int, Field(ge=2)]] = Field(
        [30, 100], min_length=1, description="labelled validation rows each of them may use"
    )
    recovery_steps: list[Annotated[int, Field(ge=1)]] = Field(
        [30, 100], min_length=1, description="training steps of 16 rows after which it is judged"
    )
    recovery_learning_rate: float = Field(5e-5, gt=0, description="of Adam, constant")
    recovery_coefficients: list[float] = Field(
        [0.5, 1.0], min_length=1, description="shared coefficients of its merges"
    )
    routing: list[str] = Field(
        [], description="ways to store merged what is used apart: emr, tall_masks; in no tier"
    )
    recompute_statistics: bool = Field(
        False, description="work out batch-norm statistics of every merge on unlabelled rows"
    )
    partners_keep: float = Field(0.95, gt=0, le=1)
    precision: Precision = Field(
        "float32", description="of every evaluation; merges are made in float32"
    )
    validation_rows: int = Field(300, ge=10)
    test_rows: int = Field(500, ge=10)

    @model_validator(mode="before")
    @classmethod
    def _by_suite(cls, given: Any) -> Any:
        """Fill in what the suite fixes; a setting that says otherwise contradicts it."""
        if not isinstance(given, dict):
            return given
        name = given.get("suite")
        if name is None and not any(key in given for key in (*QUICK.settings(), *SEARCH)):
            name = QUICK.name
        if not isinstance(name, str):
            return given
        fixed = suite(name).settings() | SEARCH
        for key, value in fixed.items():
            if given.get(key, value) != value:
                raise ValueError(
                    f"attacker.{key} is fixed by the suite '{name}'; remove it, or the suite"
                )
        return {**given, **fixed, "suite": name}


class AuditSpec(Settings):
    """One audit."""

    base: str
    release: ReleaseSpec
    control: Path | None = None
    partners: list[ReleaseSpec] = Field(min_length=1)
    attacker: AttackerSpec = AttackerSpec()
    verdict: Thresholds = Thresholds()
    scales: list[FiniteFloat] = Field(
        [0.0, 0.15, 0.3, 0.5, 0.7, 0.85, 0.95, 1.0, 1.05, 1.15, 1.3, 1.5, 1.8]
    )
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _names_differ(self) -> "AuditSpec":
        names = [self.release.task.name, *(p.task.name for p in self.partners)]
        if len(dict.fromkeys(names)) != len(names):
            raise ValueError(f"task names must differ, got {', '.join(names)}; rename one")
        return self


SpecT = TypeVar("SpecT", Recipe, BankRecipe, AuditSpec)


def load(kind: type[SpecT], path: Path, changes: list[str] | None = None) -> SpecT:
    """Read and validate a YAML file.

    Args:
        kind: `Recipe`, `BankRecipe` or `AuditSpec`.
        path: The file.
        changes: Overrides of the form `a.b=c`, applied before validation; c is read as YAML.

    Raises:
        UserError: The file is missing or not YAML, or a key or value is not acceptable.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not valid YAML: {reason}; mend that line") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no settings; start from the examples in the README")
    for change in changes or []:
        _override(content, change)
    try:
        return kind.model_validate(_rooted(content, path.parent))
    except ValidationError as error:
        raise UserError(f"{path}: {_explain(error, kind)}") from error


def _override(content: dict[str, Any], change: str) -> None:
    key, equals, value = change.partition("=")
    if not equals or not key:
        raise UserError(
            f"--set {change} is not of the form a.b=c; write for example training.steps=300"
        )
    try:
        new = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"--set {change}: the value is not valid YAML; quote it") from error
    *parents, last = key.split(".")
    place: Any = content
    for parent in parents:
        if isinstance(place, dict):
            place = place.setdefault(parent, {})
        else:
            place = place[int(parent)] if _is_index(place, parent) else None
    if isinstance(place, dict):
        place[last] = new
    elif _is_index(place, last):
        place[int(last)] = new
    else:
        raise UserError(
            f"--set {change}: '{'.'.join(parents)}' is not a group of settings, or a list so long; "
            "check the key"
        )


def _is_index(place: Any, part: str) -> bool:
    return isinstance(place, list) and part.isdecimal() and int(part) < len(place)


PATH_KEYS = (
    "train",
    "validation",
    "test",
    "imagefolder",
    "path",
    "control",
    "folder",
    "surrogates",
    "base_files",
)


def _rooted(content: Any, root: Path, key: str = "") -> Any:
    """Make relative paths absolute, from the folder of the file they stand in."""
    if isinstance(content, dict):
        return {name: _rooted(value, root, str(name)) for name, value in content.items()}
    if isinstance(content, list):
        return [_rooted(value, root, key) for value in content]
    if isinstance(content, str) and content and key in PATH_KEYS:
        return str((root / content).absolute())
    if isinstance(content, str) and key == "base" and (root / content).is_dir():
        return str((root / content).absolute())
    return content


def _explain(error: ValidationError, kind: type[BaseModel]) -> str:
    """One line about the first problem, and how many more there are."""
    problems = error.errors()
    first = problems[0]
    place = ".".join(str(part) for part in first["loc"])
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _fields_at(kind, first["loc"][:-1])
        name = str(first["loc"][-1])
        return f"unknown key '{place}';{did_you_mean(name, known)} known: {', '.join(known)}{more}"
    if first["type"] == "missing":
        return f"key '{place}' is missing; add it{more}"
    if first["type"] == "value_error":
        return f"{place or 'settings'}: {first['msg'].removeprefix('Value error, ')}{more}"
    return f"{place}={first['input']!r} is not acceptable: {first['msg'].lower()}; correct it{more}"


def _fields_at(kind: type[BaseModel], place: tuple[int | str, ...]) -> list[str]:
    for part in place:
        if isinstance(part, int):
            continue
        annotation = kind.model_fields[part].annotation
        options = get_args(annotation) or (annotation,)
        models = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if not models:
            return []
        kind = models[0]
    return list(kind.model_fields)


def config_from(settings: dict[str, Any], config_class: type[Any]) -> Any:
    """Make a settings dataclass from recipe values, with a suggestion on an unknown key.

    The key `preset` names the setting that the others change.

    Raises:
        UserError: A key is unknown or a value has the wrong type or range.
    """
    fields = {field.name: field.type for field in dataclasses.fields(config_class)}
    given = dict(settings)
    preset = given.pop("preset", None)
    values = {}
    for key, value in given.items():
        if key not in fields:
            known = [*fields, "preset"]
            raise UserError(
                f"unknown key 'trap2.{key}';{did_you_mean(key, known)} known: {', '.join(known)}"
            )
        wanted = fields[key]
        try:
            values[key] = wanted(value) if callable(wanted) else value
            if isinstance(value, float) and wanted is not float and values[key] != value:
                raise ValueError(value)
        except (ValueError, OverflowError) as error:
            name = getattr(wanted, "__name__", wanted)
            raise UserError(f"trap2.{key}={value!r} is no {name}; correct it") from error
    return config_class(**values) if preset is None else config_class.preset(str(preset), **values)
