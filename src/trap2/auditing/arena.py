"""Where the audit happens: one live base model with every task's own head on it.

Merges change the encoder in place; task heads are never merged. Each task is evaluated with its own
released head, as its users would.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from torch import Tensor, nn

from trap2.attacks.attack import load_attacks, merge
from trap2.attacks.live import LiveModel
from trap2.attacks.unlabelled import Unlabelled
from trap2.attacks.vectors import TaskVector
from trap2.auditing.contents import Contents
from trap2.auditing.ledger import Ledger
from trap2.auditing.mixture import Mixture as Mixture
from trap2.auditing.mixture import Split as Split
from trap2.checkpoint import Checkpoint
from trap2.errors import UserError
from trap2.progress import SILENT, Progress
from trap2.recipes import AuditSpec, TaskSpec
from trap2.tasks.data import load_rows
from trap2.tasks.evaluate import Evaluator
from trap2.tasks.evaluation import Evaluation
from trap2.tasks.model import Inputs, base_folder, build, load_encoder, load_head
from trap2.update import Update

RELEASE, CONTROL = "release", "control"
"""Names of the two sides; partners go by the names of their tasks."""

TAKEN = ("base", RELEASE, CONTROL)
"""What a partner's task cannot be called, for the record keeps all of them by name."""

HELD_PARAMETERS = 250_000_000
"""Updates up to this size (1 GB in float32) are kept in memory; larger ones are read each time."""

T = TypeVar("T")

Reading: TypeAlias = tuple[str, Split]
"""Whose task is read off a merge, and on which rows."""


class Member:
    """A released update with its task's head and rows.

    Attributes:
        task: Its task.
        update: What it changes.
        vector: The same, as the attacks take it.
        rows: Its task's rows of each split.
        evaluators: Its task's rows in front of the encoder under its own head.
    """

    def __init__(
        self,
        path: Path,
        task: TaskSpec,
        base: Path,
        encoder: nn.Module,
        rows: Mapping[Split, int],
        seed: int,
    ) -> None:
        self.task = task
        self.update = Update.open(path, base)
        held = self.update.parameters <= HELD_PARAMETERS
        self.vector = TaskVector.of(dict(self.update) if held else self.update)
        inputs = Inputs(base, task)
        model = build(base, task, encoder, inputs)
        load_head(model, task, self.update.head, path)
        self.rows = {
            split: load_rows(task, split, seed).first(count) for split, count in rows.items()
        }
        self.evaluators = {
            split: Evaluator(model, inputs, found) for split, found in self.rows.items()
        }


class Arena:
    """The base, the two sides and the partners of one audit.

    Evaluations are remembered: the same mixture on the same rows is never run twice. With a ledger
    not even in another run; what is found there counts as an evaluation like any other.

    Raises:
        UserError: Any input of the audit is not acceptable.
    """

    ledger: Ledger | None = None

    def __init__(
        self, spec: AuditSpec, progress: Progress = SILENT, ledger: Ledger | None = None
    ) -> None:
        self.progress, self.ledger = progress, ledger
        self.partners = tuple(partner.task.name for partner in spec.partners)
        for name in self.partners:
            if name in TAKEN:
                raise UserError(
                    f"a partner's task is called '{name}', which the report keeps for the audited "
                    f"{name}; rename the task"
                )
        base = base_folder(spec.base)
        self.base = Checkpoint(base)
        tasks = [spec.release.task, *(partner.task for partner in spec.partners)]
        self.encoder = load_encoder(base, language=any(task.is_language for task in tasks))
        self.live = LiveModel(self.encoder, self.base)
        rows: dict[Split, int] = {
            "validation": spec.attacker.validation_rows,
            "test": spec.attacker.test_rows,
        }

        def member(path: Path, task: TaskSpec) -> Member:
            return Member(path, task, base, self.encoder, rows, spec.seed)

        self.members = {RELEASE: member(spec.release.path, spec.release.task)}
        if spec.control is not None:
            self.members[CONTROL] = member(spec.control, spec.release.task)
        for partner in spec.partners:
            self.members[partner.task.name] = member(partner.path, partner.task)
        self.spec = _readable(spec, self.members[RELEASE])
        self.sides = tuple(name for name in (RELEASE, CONTROL) if name in self.members)
        self.evaluations = 0
        self._known: dict[tuple[Mixture, str, Split], Evaluation] = {}
        self._memory: dict[tuple[object, ...], object] = {}
        if ledger is not None:
            tried = spec.attacker
            attacks = (*tried.attacks, *tried.t3_attacks, *tried.data_attacks)
            for change in ledger.outdated(self._contents.places(("task_arithmetic", *attacks))):
                progress.note(change)

    def evaluate(self, mixture: Mixture, member: str, split: Split) -> Evaluation:
        """Evaluate a member's task, with its own head, on the merged encoder."""
        key = (mixture, member, split)
        if key not in self._known:
            for (name, rows), found in self._evaluated(mixture, self._due(mixture, member, split)):
                self._known[mixture, name, rows] = found
                self.evaluations += 1
                self.progress.tick()
        return self._known[key]

    def _due(self, mixture: Mixture, member: str, split: Split) -> list[Reading]:
        """What to evaluate of a merge: where making it is dear, all that may be asked of it."""
        if not load_attacks().get(mixture.attack).needs_data:
            return [(member, split)]
        return [(name, rows) for name in mixture.members for rows in self.members[name].evaluators]

    def is_known(self, mixture: Mixture, member: str, split: Split) -> bool:
        """Whether that evaluation was made already."""
        return (mixture, member, split) in self._known

    def remember(self, key: tuple[object, ...], work: Callable[[], T]) -> T:
        """The result of `work`, done once for a key."""
        if key not in self._memory:
            self._memory[key] = work()
        return self._memory[key]  # type: ignore[return-value]

    def alone(self, member: str, s: float = 1.0) -> Mixture:
        """A member by itself at scale s; s = 0 is the base."""
        return Mixture("task_arithmetic", (member,), (s,))

    def unlabelled(self, member: str, count: int | None = None) -> Unlabelled:
        """The first validation rows of a member's task, without their labels."""
        rows = self.members[member].evaluators["validation"]
        count = min(count or self.spec.attacker.unlabelled_rows, len(rows))
        return self.remember(
            ("unlabelled", member, count),
            lambda: Unlabelled(self.live, rows.model, count, rows.batch),
        )

    def _evaluated(
        self, mixture: Mixture, due: Sequence[Reading]
    ) -> Iterator[tuple[Reading, Evaluation]]:
        """What the ledger holds, and what the model says now, which the ledger then holds.

        The merge is made once for all that the ledger lacks, and not at all if it lacks nothing.
        """
        lacking = []
        for name, split in due:
            found = self._recorded(mixture, name, split)
            if found is None:
                lacking.append((name, split))
            else:
                yield (name, split), found
        if not lacking:
            return
        with self._merged(mixture):
            for name, split in lacking:
                evaluation = self.members[name].evaluators[split]()
                if self.ledger is not None:
                    content = self._contents.of(mixture, name, split)
                    self.ledger.put(content, evaluation.outputs)
                yield (name, split), evaluation

    def _recorded(self, mixture: Mixture, member: str, split: Split) -> Evaluation | None:
        """What the ledger holds of an evaluation, if anything."""
        if self.ledger is None:
            return None
        evaluator = self.members[member].evaluators[split]
        outputs = self.ledger.get(self._contents.of(mixture, member, split), len(evaluator))
        return None if outputs is None else evaluator.reading.evaluation(outputs)

    @cached_property
    def _contents(self) -> Contents:
        contents = Contents(self.base.folder, self.base.digest)
        unlabelled = self.spec.attacker.unlabelled_rows
        for name, member in self.members.items():
            contents.add(name, member.update, member.task, member.rows, unlabelled)
        return contents

    @contextmanager
    def _merged(self, mixture: Mixture) -> Iterator[None]:
        # Whatever a merge is given here must be in its `Content`, or the ledger mixes things up.
        vectors: Sequence[TaskVector] = [self.members[name].vector for name in mixture.members]
        needs_data = load_attacks().get(mixture.attack).needs_data
        params: dict[str, Any] = dict(mixture.params)
        deltas: Iterator[tuple[str, Tensor]] = merge(
            mixture.attack,
            vectors,
            mixture.coefficients,
            base=self.base,
            data=[self.unlabelled(name) for name in mixture.members] if needs_data else (),
            **params,
        )
        with self.live.merged(deltas):
            yield


def _readable(spec: AuditSpec, release: Member) -> AuditSpec:
    """The audit without re-labelling, where the release gives no class outputs to re-label."""
    if all(evaluator.reading.classes for evaluator in release.evaluators.values()):
        return spec
    attacker = spec.attacker.model_copy(update={"relabel_rows": []})
    return spec.model_copy(update={"attacker": attacker})
