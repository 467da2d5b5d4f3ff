"""The record of an audit: `report.json`, schema version 1.

Everything people see (page, plots, terminal table) is drawn from this record and nothing else.
Accuracies, retained skill and unmergeability are fractions. Words are those of `docs/method.md`:

    base a0            accuracy of the base model with the released head
    standalone a1      accuracy of the release as released (s = 1)
    control            the same recipe without the trap
    merged m           the protected task in the merge the attacker chose
    retained R         clip((m - a0) / (a1 - a0), 0, 1)
    unmergeability U   1 - max R over the attacks of a tier and of the tiers before it
    partners_keep      share of their skill that partners must keep for a merge to count
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trap2.errors import UserError
from trap2.files import read_json, weights_digest, write_json

SCHEMA_VERSION = 1

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Interval = tuple[Fraction, Fraction]
Word = Literal["holds", "leaks", "broken", "inconclusive", "nothing to protect"]
Tier = Literal["T1", "T2", "T3", "T4", "T5"]
Params = dict[str, float | int | str | bool | list[float]]


class Record(BaseModel):
    """Base of all records: nothing unknown, nothing changed after the fact, no NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Thresholds(Record):
    """Where the words of a verdict begin.

    A tier `holds` if its interval of U lies at `holds` or above, is `broken` if it lies under
    `broken`, and `leaks` if it lies between; an interval across either is `inconclusive`. If merges
    keep less than `mergeable` of the control's skill, there is nothing to protect.
    """

    holds: Fraction = 0.8
    broken: Fraction = 0.2
    mergeable: Fraction = 0.3

    @model_validator(mode="after")
    def _in_order(self) -> "Thresholds":
        if self.broken > self.holds:
            raise ValueError(f"broken={self.broken} is above holds={self.holds}; lower it")
        return self


class ReleaseInfo(Record):
    """What was audited; `recipe` is how its `trap2.json` says it was trained, by dotted key."""

    name: str
    kind: Literal["lora", "adapter", "full"]
    task: str
    classes: int
    partners: list[str]
    base: str
    has_control: bool
    trained_range: tuple[float, float] | None = None
    trained_band: float | None = None
    recipe: dict[str, str] = {}


class RelabelledReferences(Record):
    """References read through the same linear map of the outputs that a T2 attacker fits."""

    rows: int
    base: Fraction
    standalone: Fraction
    control: Fraction | None
    control_base: Fraction | None = None


class References(Record):
    """What the attacks are measured against, on test rows.

    `control_base` is the base model with the control's own head, from which its skill is counted.
    `partners_base` and `partners_chance` are the same floors for each partner's own task.
    """

    base: Fraction
    standalone: Fraction
    control: Fraction | None
    control_base: Fraction | None = None
    chance: Fraction
    relabelled: list[RelabelledReferences]
    partners: dict[str, Fraction]
    partners_base: dict[str, Fraction] = {}
    partners_chance: dict[str, Fraction] = {}


class ScalePoint(Record):
    """Accuracy and loss with the update applied at scale s, nothing merged."""

    s: float
    accuracy: Fraction
    loss: float


class PartnerScore(Record):
    """A partner task in the merge, and what the same attack reaches for it without the release."""

    merged: Fraction
    without_release: Fraction


class AttackResult(Record):
    """One attack, tuned on validation rows, scored once on test rows.

    `params` holds the coefficients the attacker chose; `admissible` says whether the partners kept
    the required share; `unconstrained_retained` is of the best mixture when partners do not matter.
    `evaluations` counts the model runs spent on it so far; runs made before are not made again.
    `interval` and `control_interval` are the 95 % intervals of `retained` over the test rows.
    `tool` and `control_tool` say which library made the merge, where one did: its `name`, its
    `version`, and what it was `told`.
    """

    name: str
    tier: Tier
    params: Params
    merged: Fraction
    retained: Fraction
    admissible: bool
    unconstrained_retained: Fraction
    partners: dict[str, PartnerScore]
    control_params: Params | None = None
    control_merged: Fraction | None = None
    control_retained: Fraction | None = None
    control_admissible: bool | None = None
    relabel_rows: int = 0
    evaluations: int = 0
    interval: Interval | None = None
    control_interval: Interval | None = None
    tool: dict[str, str] = {}
    control_tool: dict[str, str] = {}


class FrontierPoint(Record):
    """One tried mixture: skill kept against what the partners kept (validation rows)."""

    attack: str
    params: Params
    retained: Fraction
    partners_retained: float
    of: Literal["release", "control"] = "release"


class TierResult(Record):
    """The worst case of one attacker tier, the ones before it included.

    `partners_ignored` is the largest share of the skill kept when partners do not matter.
    `interval` and `control_interval` are the 95 % intervals of unmergeability over the test rows; a
    tier is `inconclusive` if its interval does not tell which other word is right.
    """

    unmergeability: Fraction
    worst_attack: str
    control_unmergeability: Fraction | None
    partners_ignored: Fraction | None = None
    by_rows: dict[str, Fraction] = {}
    control_by_rows: dict[str, Fraction] = {}
    verdict: Word
    interval: Interval | None = None
    control_interval: Interval | None = None


class RecoveryPoint(Record):
    """One attack that trains, with one budget: the best merge it ends in, scored on test rows.

    `budget_rows` are labelled rows (unlabelled ones for `distil`), `budget_steps` training steps;
    0 for a probe, which is fitted. `without_release` is what the same attack reaches with the same
    budget and without the release, so that `retained` is what the release is worth to it:
    clip((accuracy - without_release) / (standalone - without_release), 0, 1). `unconstrained` is
    `retained` if the partners do not matter. A `reference` is no attack on a merge and counts in no
    tier. `interval` and `control_interval` are the 95 % intervals of `retained` over the test rows.
    """

    method: str
    reference: bool = False
    budget_rows: int
    budget_steps: int
    coefficient: float
    accuracy: Fraction
    without_release: Fraction
    standalone: Fraction
    retained: Fraction
    unconstrained: Fraction
    admissible: bool
    partners: dict[str, PartnerScore]
    control_coefficient: float | None = None
    control_accuracy: Fraction | None = None
    control_without_release: Fraction | None = None
    control_standalone: Fraction | None = None
    control_retained: Fraction | None = None
    control_admissible: bool | None = None
    interval: Interval | None = None
    control_interval: Interval | None = None


class RoutingResult(Record):
    """Models stored merged and used apart, each by a mask of its own; every one at its scale 1.

    It counts in no tier: no protection in the weights can claim to stop it. `partners` are the
    partners' accuracies, routed to in the same way, beside the release.
    """

    name: str
    params: Params
    accuracy: Fraction
    retained: Fraction
    partners: dict[str, Fraction]
    control_params: Params | None = None
    control_accuracy: Fraction | None = None
    control_retained: Fraction | None = None


class Evidence(Record):
    """What the checks weigh beside the scores: how the releases were made and what was tried.

    `grids` holds, by attack, the values tried in T1 and T2: of its own parameters, and of the
    protected model's `coefficient` (or its `place`, from 0 to 1, on the way to another model).
    `control_differs` lists the keys in which the recipes of control and release differ; None where
    they could not be compared. `reload_gap` is, by side, the largest difference between its logits
    at s = 1 and those of the release as its users load it, as a share of the largest logit; None
    where it could not be loaded.
    """

    grids: dict[str, dict[str, list[float]]] = {}
    control_differs: list[str] | None = None
    surrogates: list[str] = []
    batch_norm_layers: int = 0
    reload_gap: dict[str, float | None] = {}


class Flag(Record):
    """One reason to doubt this audit; `docs/flags.md` has an entry for every code."""

    code: str
    title: str
    detail: str


class Report(Record):
    """One audit."""

    schema_version: Literal[1] = 1
    release: ReleaseInfo
    references: References
    utility_cost: float | None
    utility_cost_interval: tuple[float, float] | None = None
    scale_curve: list[ScalePoint]
    control_scale_curve: list[ScalePoint]
    attacks: list[AttackResult]
    frontier: list[FrontierPoint]
    recovery: list[RecoveryPoint] = []
    routing: list[RoutingResult] = []
    tiers: dict[Tier, TierResult]
    partners_keep: Fraction = 0.95
    thresholds: Thresholds = Thresholds()
    evidence: Evidence = Evidence()
    verdict: str
    flags: list[Flag] = []
    limits: list[str]
    settings: dict[str, Any]
    versions: dict[str, str]
    machine: dict[str, str]
    seed: int
    digests: dict[str, str]
    rows: dict[str, int]
    created: str
    seconds: float

    def save(self, path: Path) -> None:
        """Write the record so that it is whole or absent."""
        write_json(path, self.model_dump(mode="json"))

    def check_weights(self, folder: Path) -> None:
        """Refuse a folder of other weights than those this record speaks of.

        Raises:
            UserError: The folder is none, cannot be read, or its weights have another digest.
        """
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder; give a release folder")
        try:
            found = weights_digest(folder)
        except OSError as error:
            raise UserError(
                f"cannot read {error.filename}: {error.strerror}; check the release"
            ) from error
        audited = self.digests.get("release")
        if found != audited:
            raise UserError(
                f"the report is of weights {audited}, but those in {folder} are {found}; "
                "give the report of these weights, or audit them"
            )

    @classmethod
    def load(cls, path: Path) -> "Report":
        """Read a record back.

        Raises:
            UserError: The file is missing, or not a report of this schema version.
        """
        record = read_json(path)
        version = record.get("schema_version")
        if version != SCHEMA_VERSION:
            raise UserError(
                f"{path} has schema_version {version!r}, this version reads {SCHEMA_VERSION}; "
                "use the version of trap2 that wrote it"
            )
        try:
            return cls.model_validate(record)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise UserError(
                f"{path} is not a whole report: {place}: {first['msg']}; run the audit again"
            ) from error


class OverSeeds(Record):
    """One number of several audits, which differ in the training seed alone.

    `deviation` is the sample deviation over seeds; `interval` is that of the mean, at 95 %.
    """

    mean: float
    deviation: float
    interval: tuple[float, float]
    values: list[float]


class CombinedTier(Record):
    """One attacker tier over several seeds; `verdicts` are those of the single audits."""

    unmergeability: OverSeeds
    control_unmergeability: OverSeeds | None
    verdict: Word
    verdicts: list[Word]


class Combined(Record):
    """Several audits of one recipe under different seeds, in the order they were given.

    `release` is that of the first, without its seed; `seeds` and `digests` are those of all.
    """

    schema_version: Literal[1] = 1
    release: ReleaseInfo
    seeds: list[str]
    base: OverSeeds
    standalone: OverSeeds
    control: OverSeeds | None
    utility_cost: OverSeeds | None
    tiers: dict[Tier, CombinedTier]
    thresholds: Thresholds
    flags: list[Flag]
    settings: dict[str, Any]
    rows: dict[str, int]
    digests: list[dict[str, str]]

    def save(self, path: Path) -> None:
        """Write the record so that it is whole or absent."""
        write_json(path, self.model_dump(mode="json"))
