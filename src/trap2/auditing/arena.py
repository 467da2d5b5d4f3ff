"""Where the audit happens: one live base model with every task's own head on it.

Merges change the encoder in place; task heads are never merged. Each task is evaluated with its own
released head, as its users would.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar

from torch import Tensor, nn

from trap2.attacks.attack import load_attacks, merge
from trap2.attacks.live import LiveModel
from trap2.attacks.undo import undone
from trap2.attacks.unlabelled import Unlabelled
from trap2.attacks.vectors import TaskVector, Tensors
from trap2.auditing.contents import Content, Contents
from trap2.auditing.ledger import Ledger
from trap2.auditing.mixture import Mixture as Mixture
from trap2.auditing.mixture import Split as Split
from trap2.auditing.mixture import Whole as Whole
from trap2.checkpoint import Checkpoint
from trap2.errors import UserError
from trap2.progress import SILENT, Progress
from trap2.recipes import AuditSpec, Precision, TaskSpec
from trap2.statistics import mixed, normalising, recomputed
from trap2.tasks.data import Rows, load_rows
from trap2.tasks.evaluate import Evaluator
from trap2.tasks.evaluation import Evaluation
from trap2.tasks.model import Inputs, base_folder, build, device_of, load_encoder, load_head, placed
from trap2.update import Update

RELEASE, CONTROL = "release", "control"
"""Names of the two sides; partners go by the names of their tasks."""

TAKEN = ("base", RELEASE, CONTROL)
"""What a partner's task cannot be called, for the record keeps all of them by name."""

EARLY = 4
"""One validation row in so many makes a first look."""

HELD_PARAMETERS = 250_000_000
"""Updates up to this size (1 GB in float32) are kept in memory; larger ones are read each time."""

T = TypeVar("T")

Reading: TypeAlias = tuple[str, Split]
"""Whose task is read off a merge, and on which rows."""

WHOLE: tuple[Whole, ...] = ("validation", "test")
"""Where all rows are read."""

Job: TypeAlias = tuple[Mixture, tuple[Reading, ...]]
"""A merge, and all that is read off it."""

Done: TypeAlias = list[tuple[Reading, str, Tensor]]
"""Of a job every reading, the key of its content, and its logits."""


class Crew(Protocol):
    """Others who do jobs, so many at a time: `workers.py`."""

    count: int

    def __call__(self, jobs: Sequence[Job]) -> Iterator[tuple[Mixture, Done]]:
        """Do the jobs, in any order."""


class Member:
    """A released update with its task's head and rows.

    Attributes:
        task: Its task.
        update: What it changes.
        vector: The same as the attacks take it, brought into the base's basis where asked for.
        rows: Its task's rows of each split.
        evaluators: Its task's rows in front of the encoder under its own head.
    """

    def __init__(
        self,
        path: Path,
        task: TaskSpec,
        base: Path,
        encoder: nn.Module,
        rows: Mapping[Whole, int],
        seed: int,
        precision: Precision = "float32",
        undo: str | None = None,
    ) -> None:
        self.task = task
        self.update = Update.open(path, base)
        held = self.update.parameters <= HELD_PARAMETERS
        given = TaskVector.of(self.update) if undo is None else undone(self.update, undo)
        given = given.on(device_of(encoder))
        self.vector = given.held() if held else given
        inputs = Inputs(base, task)
        model = build(base, task, encoder, inputs)
        load_head(model, task, self.update.head, path)
        self.rows: dict[Split, Rows] = {
            split: load_rows(task, split, seed).first(count) for split, count in rows.items()
        }
        if "validation" in rows:
            known = self.rows["validation"]
            self.rows["early"] = known.first(max(1, len(known) // EARLY))
        self.evaluators = {
            split: Evaluator(model, inputs, found, precision) for split, found in self.rows.items()
        }


class Arena:
    """The base, the two sides and the partners of one audit.

    Evaluations are remembered: the same mixture on the same rows is never run twice. With a ledger
    not even in another run; what is found there counts as an evaluation like any other. A crew puts
    there what is certain to be asked for, so it changes how long an audit takes and nothing else.

    Raises:
        UserError: Any input of the audit is not acceptable.
    """

    def __init__(
        self,
        spec: AuditSpec,
        progress: Progress = SILENT,
        ledger: Ledger | None = None,
        crew: Crew | None = None,
    ) -> None:
        if crew is not None and ledger is None:
            raise UserError("several workers meet in a ledger; give one, or do without workers")
        self.progress, self.ledger, self.crew = progress, ledger, crew
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
        if spec.attacker.recompute_statistics and not normalising(self.encoder):
            raise UserError(
                f"attacker.recompute_statistics is set, but {base} has no batch-norm layers with "
                "running statistics; remove it"
            )
        rows: dict[Whole, int] = {
            "validation": spec.attacker.validation_rows,
            "test": spec.attacker.test_rows,
        }

        def member(path: Path, task: TaskSpec) -> Member:
            tried = spec.attacker
            return Member(
                path, task, base, self.encoder, rows, spec.seed, tried.precision, tried.undo
            )

        self.members = {RELEASE: member(spec.release.path, spec.release.task)}
        if spec.control is not None:
            self.members[CONTROL] = member(spec.control, spec.release.task)
        for partner in spec.partners:
            self.members[partner.task.name] = member(partner.path, partner.task)
        self.spec = _readable(spec, self.members[RELEASE])
        self.sides = tuple(name for name in (RELEASE, CONTROL) if name in self.members)
        self.evaluations = 0
        self._known: dict[tuple[Mixture, str, Split], Evaluation] = {}
        self._ahead: set[tuple[Mixture, str, Split]] = set()
        self._memory: dict[tuple[object, ...], object] = {}
        if ledger is not None:
            tried = spec.attacker
            attacks = (*tried.attacks, *tried.t3_attacks, *tried.data_attacks, *tried.routing)
            for change in ledger.outdated(self.contents.places(("task_arithmetic", *attacks))):
                progress.note(change)

    def evaluate(self, mixture: Mixture, member: str, split: Split) -> Evaluation:
        """Evaluate a member's task, with its own head, on the merged encoder."""
        return self.read(mixture, [(member, split)])[0]

    def read(self, mixture: Mixture, readings: Sequence[Reading]) -> list[Evaluation]:
        """Evaluate several tasks on one mixture, which is merged once for all of them."""
        wanted = dict.fromkeys(readings)
        asked = [reading for reading in wanted if (mixture, *reading) not in self._known]
        for (name, rows), found in self._evaluated(mixture, self._due(mixture, asked)):
            self._known[mixture, name, rows] = found
            self.evaluations += 1
            if (mixture, name, rows) not in self._ahead:
                self.progress.tick()
        return [self._known[mixture, name, rows] for name, rows in readings]

    def peek(self, mixture: Mixture, readings: Sequence[Reading]) -> list[Evaluation]:
        """The same of what the crew has made, which counts only once it is read."""
        found = (self._recorded(mixture, *reading) for reading in readings)
        return [evaluation for evaluation in found if evaluation is not None]

    def prepare(self, wanted: Iterable[tuple[Mixture, str, Split]]) -> None:
        """Have the crew make evaluations before they are asked for; without one, do nothing.

        Each is in the ledger as soon as it is there. What `evaluate` gives stays the same, and so
        does what it counts.

        Args:
            wanted: Mixtures, each with a member whose task is read off it and a split.

        Raises:
            UserError: A worker reads other files or has other libraries, or workers keep dying.
        """
        if self.crew is None or self.ledger is None:
            return
        jobs: dict[Mixture, dict[Reading, None]] = {}
        for mixture, member, split in wanted:
            for reading in self._due(mixture, [(member, split)]):
                if self.is_ready((mixture, *reading)):
                    continue
                if self._recorded(mixture, *reading) is None:
                    jobs.setdefault(mixture, {})[reading] = None
        for mixture, done in self.crew([(m, tuple(readings)) for m, readings in jobs.items()]):
            for reading, key, logits in done:
                content = self.contents.of(mixture, *reading)
                if content.key != key:
                    raise UserError(
                        f"a worker did not read what this process reads for {mixture}: weights, "
                        "rows, code and library versions must be the same everywhere"
                    )
                self.ledger.put(content, logits)
                self._ahead.add((mixture, *reading))
                self.progress.tick()

    def is_ready(self, asked: tuple[Mixture, str, Split]) -> bool:
        """Whether that evaluation was made, by the crew or by this process."""
        return asked in self._known or asked in self._ahead

    @property
    def width(self) -> int:
        """How many jobs are done at a time."""
        return 1 if self.crew is None else self.crew.count

    def _due(self, mixture: Mixture, asked: Sequence[Reading]) -> list[Reading]:
        """What to evaluate of a merge: where making it is dear, all that may be asked of it."""
        if not asked or not load_attacks().get(mixture.attack).needs_data:
            return [*asked]
        return [(name, split) for name in mixture.members for split in WHOLE]

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

    @contextmanager
    def holding(self, deltas: Iterable[tuple[str, Tensor]], mixture: Mixture) -> Iterator[None]:
        """Inside the `with` block the encoder has the weights of this mixture.

        Running statistics are worked out anew where the attacker does that; a release as it is
        keeps its own, and so does the base. At another scale they could even become negative.
        """
        with self.live.merged(deltas):
            if self.spec.attacker.recompute_statistics and not mixture.is_unchanged:
                with recomputed(self.encoder, self._mixed(mixture.members)):
                    yield
            else:
                yield

    def _mixed(self, members: tuple[str, ...]) -> list[dict[str, Tensor]]:
        """Unlabelled rows of several members' tasks, as the encoder takes them."""

        def batches() -> list[dict[str, Tensor]]:
            count = self.spec.attacker.unlabelled_rows
            seen = [self.members[name].rows["validation"].first(count) for name in members]
            inputs = [self.members[name].evaluators["validation"].inputs for name in members]
            encoded = [i.encode(list(rows.inputs)) for i, rows in zip(inputs, seen, strict=True)]
            return [placed(inputs[0].batch(rows), self.encoder) for rows in mixed(encoded)]

        return self.remember(("mixed", members), batches)

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
        for reading, evaluation in self.run(mixture, lacking):
            if self.ledger is not None:
                self.ledger.put(self.contents.of(mixture, *reading), evaluation.outputs)
            yield reading, evaluation

    def run(
        self, mixture: Mixture, readings: Sequence[Reading]
    ) -> Iterator[tuple[Reading, Evaluation]]:
        """Merge once and evaluate, whatever is known already."""
        if readings:
            with self._merged(mixture):
                for name, split in readings:
                    yield (name, split), self.members[name].evaluators[split]()

    def recorded(
        self, content: Callable[[], Content], evaluator: Evaluator, work: Callable[[], Evaluation]
    ) -> Evaluation:
        """What the ledger holds for a content, or the result of `work`, which it then holds."""
        if self.ledger is None:
            return work()
        asked = content()
        outputs = self.ledger.get(asked, len(evaluator))
        if outputs is not None:
            return evaluator.reading.evaluation(outputs)
        found = work()
        self.ledger.put(asked, found.outputs)
        return found

    def _recorded(self, mixture: Mixture, member: str, split: Split) -> Evaluation | None:
        """What the ledger holds of an evaluation, if anything."""
        if self.ledger is None:
            return None
        evaluator = self.members[member].evaluators[split]
        outputs = self.ledger.get(self.contents.of(mixture, member, split), len(evaluator))
        return None if outputs is None else evaluator.reading.evaluation(outputs)

    @cached_property
    def contents(self) -> Contents:
        """What its evaluations depend on."""
        tried = self.spec.attacker
        contents = Contents(
            self.base.folder, self.base.digest, tried.precision, tried.recompute_statistics
        )
        for name, member in self.members.items():
            rows, unlabelled = member.rows, tried.unlabelled_rows
            contents.add(name, member.update, member.task, rows, unlabelled, tried.undo)
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
            base=Tensors.of_base(self.base).on(device_of(self.encoder)),
            data=[self.unlabelled(name) for name in mixture.members] if needs_data else (),
            **params,
        )
        with self.holding(deltas, mixture):
            yield


def _readable(spec: AuditSpec, release: Member) -> AuditSpec:
    """The audit without re-labelling, where the release gives no class outputs to re-label."""
    if all(evaluator.reading.classes for evaluator in release.evaluators.values()):
        return spec
    attacker = spec.attacker.model_copy(update={"relabel_rows": []})
    return spec.model_copy(update={"attacker": attacker})
