"""What a task is in YAML: its rows, its kind, and how an answer is scored.

Two families. With classes, a head stands on the encoder and its outputs are (N, C). Without, the
model is the base's own language model, and a row is a prompt and what should follow it.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ImportString, model_validator

Kind = Literal["text", "image", "language", "generation", "choice", "lm_eval", "function"]

CLASSIFIED = ("text", "image")
TRAINED = (*CLASSIFIED, "language", "generation", "choice")
"""Kinds whose rows say what to learn; the others only judge."""

COLUMNS = {
    "text": ("text", "label"),
    "image": ("image", "label"),
    "language": ("prompt", "completion"),
    "generation": ("prompt", "completion"),
    "choice": ("prompt", "label"),
    "function": ("text", "label"),
}
"""The columns of a kind's input and of what is right for it, unless `input` and `label` say."""


class Settings(BaseModel):
    """Base of everything in a recipe: nothing unknown, nothing changed later."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSpec(Settings):
    """Where labelled rows come from: files, an image folder, or a Hub data set."""

    train: Path | None = Field(None, description="csv, json(l), parquet or txt (paragraphs) file")
    validation: Path | None = Field(None, description="same; carved from train where absent")
    test: Path | None = Field(None, description="same; needed by audits")
    imagefolder: Path | None = Field(None, description="folder of split/class/image files")
    hub: str | None = Field(None, description="id of a Hub data set")
    hub_config: str | None = Field(None, description="its configuration")
    validation_fraction: float = Field(0.1, gt=0, lt=1, description="carved from train")

    @model_validator(mode="after")
    def _one_source(self) -> "DataSpec":
        given = [self.train or self.validation or self.test, self.imagefolder, self.hub]
        if sum(source is not None for source in given) != 1:
            raise ValueError("give exactly one source: files (train, ...), imagefolder or hub")
        return self


class HarnessSpec(Settings):
    """A task of lm-evaluation-harness, which reads its own rows."""

    task: str = Field(min_length=1, description="its name there")
    folder: Path | None = Field(None, description="your own task files; else those it comes with")
    metric: str = Field("acc", description="a metric of the task that is in [0, 1] for each row")


class TaskSpec(Settings):
    """One task: its rows, and either classes under a head or a language model."""

    name: str = Field(min_length=1, max_length=200)
    kind: Kind = "text"
    data: DataSpec | None = Field(None, description="its rows; only lm_eval brings its own")
    input: str | None = Field(None, description="column of the text, image or prompt")
    label: str | None = Field(None, description="column of the class, completion or right option")
    classes: list[str] = Field([], description="class names, in label order; options of a choice")
    descriptions: list[str] | None = Field(
        None, description="one sentence a class: a frozen zero-shot head; else a trained one"
    )
    temperature: float = Field(
        20.0, gt=0, description="multiplies the cosine of a description head"
    )
    max_length: int = Field(128, gt=1, description="tokens kept of each text")
    limit: dict[Literal["train", "validation", "test"], Annotated[int, Field(gt=0)]] = Field(
        default_factory=dict, description="use only so many rows of a split"
    )
    score: Literal["accuracy", "likelihood"] = Field(
        "accuracy", description="of kind language: share of right tokens, or exp(-loss)"
    )
    max_new_tokens: int = Field(32, ge=1, description="of kind generation: tokens generated")
    stop: str | None = Field(None, min_length=1, description="of kind generation: where it is cut")
    options: str = Field("options", description="of kind choice: column of the options")
    length_normalised: bool = Field(
        True, description="of kind choice: log-likelihood per character, not of the whole option"
    )
    lm_eval: HarnessSpec | None = Field(None, description="of kind lm_eval: which task")
    function: ImportString[Callable[..., Any]] | None = Field(
        None, description="of kind function: module:function, which is imported and called"
    )

    @property
    def is_language(self) -> bool:
        """Whether the model is the base's own language model; else it has a head of classes."""
        if self.kind == "function":
            return not self.classes
        return self.kind not in CLASSIFIED

    @property
    def columns(self) -> tuple[str, str]:
        """The columns of a row's input and of what is right for it."""
        column, label = COLUMNS[self.kind]
        return self.input or column, self.label or label

    @model_validator(mode="after")
    def _sound(self) -> "TaskSpec":
        if (self.data is None) is not (self.kind == "lm_eval"):
            raise ValueError(
                "kind lm_eval reads its own rows; remove data"
                if self.data
                else f"kind {self.kind} needs data; add it"
            )
        if self.kind in CLASSIFIED and not self.classes:
            raise ValueError(f"kind {self.kind} needs classes; add their names")
        if len(self.classes) == 1:
            raise ValueError("one class is no choice; name two or more")
        if len(dict.fromkeys(self.classes)) != len(self.classes):
            raise ValueError("a class name stands twice; names must differ")
        return self

    @model_validator(mode="after")
    def _sound_head(self) -> "TaskSpec":
        if self.descriptions is None:
            return self
        if self.is_language or self.kind == "image":
            raise ValueError("descriptions need kind: text; remove them to train a classifier head")
        if len(self.descriptions) != len(self.classes):
            raise ValueError(
                f"{len(self.descriptions)} descriptions for {len(self.classes)} classes; "
                "give one each"
            )
        return self

    @model_validator(mode="after")
    def _sound_judge(self) -> "TaskSpec":
        for kind, given in (("lm_eval", self.lm_eval), ("function", self.function)):
            if (self.kind == kind) is not (given is not None):
                raise ValueError(f"task.{kind} and kind: {kind} go together; give both or neither")
        if self.function is not None:
            module = sys.modules.get(getattr(self.function, "__module__", ""))
            name = getattr(self.function, "__qualname__", "")
            if getattr(module, name, None) is not self.function:
                raise ValueError(
                    f"{self.function!r} is no function at the top of a module, so no record could "
                    "name it; define it there"
                )
        return self
