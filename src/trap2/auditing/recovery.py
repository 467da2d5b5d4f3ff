"""Tier T5: an attacker who trains on labelled rows, with a stated budget, before or after merging.

    probe            a linear probe on the representation of the merge
    finetune_before  the release is fine-tuned with the plain loss, then merged
    finetune_after   the merge is fine-tuned with the plain loss on the protected task
    distil           a fresh update is trained to imitate the release, then merged: the reference

Labelled rows teach a task without any release. So everything is done twice with the same budget,
the second time without the release, and only what goes beyond that is skill taken from it.
Distillation needs nothing but a release that works alone, so no weight-space defence hinders it;
an attack is worth its name only where it is cheaper than that.

All merges are task arithmetic with one shared coefficient. Every weight that any of the merged
updates changes is trained, with Adam at a fixed learning rate. Training is done when an evaluation
is first asked for that the ledger lacks, so a killed audit trains nothing twice.

Symbols: dW update; c shared coefficient.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from trap2.attacks.attack import equal, merge
from trap2.attacks.tuning import answers, imitation, tuned
from trap2.attacks.vectors import TaskVector
from trap2.auditing.arena import CONTROL, RELEASE, WHOLE, Mixture
from trap2.auditing.attacker import Attacker
from trap2.auditing.bootstrap import Bootstrap, Floats, Retained, interval, retained_share
from trap2.auditing.candidate import Candidate, Choice, choose
from trap2.auditing.verdict import retained_skill
from trap2.errors import UserError
from trap2.recipes import AttackerSpec
from trap2.schema import AttackResult, PartnerScore, RecoveryPoint

MERGE = "task_arithmetic"
REFERENCES = ("distil",)
"""What takes the skill without merging the release: recorded, and counted in no tier."""

Budget: TypeAlias = tuple[int, int]
"""Labelled rows, training steps."""

How: TypeAlias = Mapping[str, Any]
"""What was done to an update, by name, for the ledger."""

Found: TypeAlias = Iterator[tuple[int, list[Candidate]]]
"""After so many steps, what the attacker may choose from."""


def check_budget(spec: AttackerSpec, rows: int) -> None:
    """Refuse budgets that leave no rows to choose by.

    Args:
        spec: What the attacker may spend.
        rows: Validation rows there are.

    Raises:
        UserError: A method would train on all of them.
    """
    wanted = max(spec.recovery_rows) if spec.recovery else 0
    if wanted >= rows:
        raise UserError(
            f"recovery_rows={wanted} leaves none of {rows} validation rows to choose a merge by; "
            "lower it or raise validation_rows"
        )


class Trainer:
    """One attacker who trains, against one side of an arena."""

    def __init__(self, attacker: Attacker) -> None:
        self.arena, self.side = attacker.arena, attacker.side
        self.spec = attacker.arena.spec.attacker
        self.everyone = (self.side, *self.arena.partners)
        self._partners_alone = attacker.reference(MERGE)
        self.floors = {
            split: {
                p: self.arena.evaluate(self._partners_alone, p, split).accuracy
                for p in self.arena.partners
            }
            for split in WHOLE
        }

    def choices(self, method: str, with_release: bool) -> dict[Budget, Choice]:
        """What one method ends in, for every budget."""
        who = self.side if with_release else "partners alone"
        self.arena.progress.say(f"{method} on the {who}, trained")
        keep, found = self.spec.partners_keep, {}
        for rows in self.spec.recovery_rows:
            least = [] if with_release else [self.untrained(rows, method == "probe")]
            for steps, trained in METHODS[method](self, rows, with_release):
                candidates = [*least, *trained]
                found[rows, steps] = choose(candidates, self.side, self.floors["validation"], keep)
        return found

    def own(self, with_release: bool) -> TaskVector:
        """The side's update, or nothing of the same shape."""
        vector = self.arena.members[self.side].vector
        if with_release:
            return vector
        return self.arena.remember(
            ("nothing", self.side),
            lambda: TaskVector.of({name: torch.zeros_like(vector[name]) for name in vector}),
        )

    def merged(self, own: TaskVector, c: float) -> Iterator[tuple[str, Tensor]]:
        """Task arithmetic of an update and all partners."""
        vectors = [own, *(self.arena.members[p].vector for p in self.arena.partners)]
        return merge(MERGE, vectors, equal(c, len(vectors)))

    def untrained(self, rows: int, probed: bool) -> Candidate:
        """The partners' own merge, which always counts: there is nothing it takes from them."""
        mixture = self._partners_alone
        vectors = [self.arena.members[p].vector for p in mixture.members]

        def deltas() -> Iterator[tuple[str, Tensor]]:
            return merge(MERGE, vectors, mixture.coefficients)

        return Candidate(self.arena, self.side, mixture, deltas, rows, {}, probed)

    def alone(self, rows: int, probed: bool) -> Candidate:
        """The side as released."""
        mixture = self.arena.alone(self.side)
        return Candidate(self.arena, self.side, mixture, self.own(True).items, rows, {}, probed)

    def candidates(
        self, own: Callable[[], TaskVector], rows: int, how: How, probed: bool = False
    ) -> list[Candidate]:
        """The merges of an update at every coefficient."""

        def deltas(c: float) -> Iterator[tuple[str, Tensor]]:
            return self.merged(own(), c)

        return [
            Candidate(self.arena, self.side, self.mixture(c), partial(deltas, c), rows, how, probed)
            for c in self.spec.recovery_coefficients
        ]

    def mixture(self, c: float) -> Mixture:
        """The side and all partners, as released."""
        members = (self.side, *self.arena.partners)
        return Mixture(MERGE, members, equal(c, len(members)))

    def how(self, method: str, with_release: bool, rows: int, steps: int) -> How:
        """All that decides what training ends in, beside what is merged."""
        return {
            "method": method,
            "with_release": with_release,
            "rows": rows,
            "steps": steps,
            "learning_rate": self.spec.recovery_learning_rate,
            "seed": self.arena.spec.seed,
        }

    def course(
        self, start: Callable[[], Mapping[str, Tensor]], rows: int, imitate: bool = False
    ) -> Callable[[int], TaskVector]:
        """Training that begins when the update after some of its steps is first asked for."""
        trained = cache(lambda: dict(self.training(start(), rows, imitate)))
        return lambda steps: trained()[steps]

    def training(
        self, start: Mapping[str, Tensor], rows: int, imitate: bool = False
    ) -> Iterator[tuple[int, TaskVector]]:
        """Train an update on the first rows of the side's task.

        Args:
            start: dW to start from.
            rows: How many rows.
            imitate: Learn the side's own answers instead of the labels.

        Yields:
            (steps, dW) for every number of steps in the budget.
        """
        data = self.arena.unlabelled(self.side, rows)
        labels = self.arena.members[self.side].evaluators["validation"].labels[:rows]
        targets = answers(data, dict(self.own(True))) if imitate else labels.to(data.device)
        steps = max(self.spec.recovery_steps)
        course = tuned(
            data,
            start,
            targets,
            imitation if imitate else F.cross_entropy,
            steps=steps,
            learning_rate=self.spec.recovery_learning_rate,
            seed=self.arena.spec.seed,
        )
        for step, at in course:
            if step in self.spec.recovery_steps:
                yield step, TaskVector.of({n: delta.detach().clone() for n, delta in at.items()})


def _probe(trainer: Trainer, rows: int, with_release: bool) -> Found:
    how = {} if with_release else {"with_release": False}
    yield 0, trainer.candidates(partial(trainer.own, with_release), rows, how, probed=True)


def _finetune_before(trainer: Trainer, rows: int, with_release: bool) -> Found:
    after = trainer.course(lambda: dict(trainer.own(with_release)), rows)
    for steps in trainer.spec.recovery_steps:
        how = trainer.how("finetune_before", with_release, rows, steps)
        yield steps, trainer.candidates(partial(after, steps), rows, how)


def _distil(trainer: Trainer, rows: int, with_release: bool) -> Found:
    if not with_release:  # no teacher, nothing to learn
        yield from ((steps, []) for steps in trainer.spec.recovery_steps)
        return
    after = trainer.course(lambda: dict(trainer.own(False)), rows, imitate=True)
    for steps in trainer.spec.recovery_steps:
        how = trainer.how("distil", with_release, rows, steps)
        yield steps, trainer.candidates(partial(after, steps), rows, how)


def _finetune_after(trainer: Trainer, rows: int, with_release: bool) -> Found:
    found: dict[int, list[Candidate]] = {steps: [] for steps in trainer.spec.recovery_steps}

    def start(c: float) -> Mapping[str, Tensor]:
        return dict(trainer.merged(trainer.own(with_release), c))

    for c in trainer.spec.recovery_coefficients:
        after, mixture = trainer.course(partial(start, c), rows), trainer.mixture(c)
        for steps in found:
            how = trainer.how("finetune_after", with_release, rows, steps)
            whole = partial(after, steps)
            candidate = Candidate(trainer.arena, trainer.side, mixture, _items(whole), rows, how)
            found[steps].append(candidate)
    yield from found.items()


def _items(vector: Callable[[], TaskVector]) -> Callable[[], Iterable[tuple[str, Tensor]]]:
    return lambda: vector().items()


METHODS: dict[str, Callable[[Trainer, int, bool], Found]] = {
    "probe": _probe,
    "finetune_before": _finetune_before,
    "finetune_after": _finetune_after,
    "distil": _distil,
}


def recovery(
    attackers: Mapping[str, Attacker], bootstrap: Bootstrap
) -> tuple[list[RecoveryPoint], dict[str, Retained]]:
    """Every trained attack of an audit, on both sides.

    Args:
        attackers: The attacker of each side.
        bootstrap: Resamples of the test rows.

    Returns:
        What they reached, and by side the retained skill in every resample of those that count.
    """
    spec = attackers[RELEASE].arena.spec.attacker
    trainers = {side: Trainer(attacker) for side, attacker in attackers.items() if spec.recovery}
    retained: dict[str, Retained] = {side: {} for side in attackers}
    points = []
    for method in spec.recovery:
        for point, kept in _points(method, trainers, bootstrap):
            points.append(point)
            name = f"{method}, {point.budget_steps} steps"
            for side, share in ({} if point.reference else kept).items():
                retained[side][name, "T5", point.budget_rows] = share
    return points, retained


def _points(
    method: str, trainers: Mapping[str, Trainer], bootstrap: Bootstrap
) -> Iterator[tuple[RecoveryPoint, dict[str, Floats]]]:
    """A point for every budget, and by side its retained skill in every resample."""
    found = {
        side: [trainer.choices(method, with_release) for with_release in (True, False)]
        for side, trainer in trainers.items()
    }
    for budget in found[RELEASE][0]:
        sides, kept = {}, {}
        for side, trainer in trainers.items():
            taken, without = (choices[budget] for choices in found[side])
            alone = trainer.alone(budget[0], method == "probe")
            kept[side] = _retained(bootstrap, taken, without, alone)
            sides[side] = _side(trainer, taken, without, alone) | {"interval": interval(kept[side])}
        point = RecoveryPoint(
            method=method,
            reference=method in REFERENCES,
            budget_rows=budget[0],
            budget_steps=budget[1],
            **sides[RELEASE],
            **{
                f"control_{key}": value
                for key, value in sides.get(CONTROL, {}).items()
                if key not in ("partners", "unconstrained")
            },
        )
        yield point, kept


def _retained(bootstrap: Bootstrap, taken: Choice, without: Choice, alone: Candidate) -> Floats:
    """R (2, B): see `retained_share`."""
    merged = (taken if taken.admissible else without).scores
    rows = (merged, without.scores, alone.scores("test"))
    return retained_share(*map(bootstrap.resampled, rows))


def _side(trainer: Trainer, taken: Choice, without: Choice, alone: Candidate) -> dict[str, object]:
    """One side's part of a point. A choice that does not count leaves the release out."""
    standalone = alone.accuracy(trainer.side, "test")
    accuracy = taken.accuracy if taken.admissible else without.accuracy
    return {
        "coefficient": taken.coefficient,
        "accuracy": accuracy,
        "without_release": without.accuracy,
        "standalone": standalone,
        "retained": retained_skill(accuracy, without.accuracy, standalone),
        "unconstrained": retained_skill(taken.unconstrained, without.unconstrained, standalone),
        "admissible": taken.admissible,
        "partners": {
            p: PartnerScore(merged=accuracy, without_release=trainer.floors["test"][p])
            for p, accuracy in taken.partners.items()
        },
    }


def as_attacks(points: Sequence[RecoveryPoint]) -> list[AttackResult]:
    """The points that count, as results of tier T5."""
    return [
        AttackResult(
            name=point.method,
            tier="T5",
            params={"c": point.coefficient, "steps": point.budget_steps},
            merged=point.accuracy,
            retained=point.retained,
            admissible=point.admissible,
            unconstrained_retained=point.unconstrained,
            partners=point.partners,
            control_params=None
            if point.control_coefficient is None
            else {"c": point.control_coefficient, "steps": point.budget_steps},
            control_merged=point.control_accuracy,
            control_retained=point.control_retained,
            control_admissible=point.control_admissible,
            relabel_rows=point.budget_rows,
            interval=point.interval,
            control_interval=point.control_interval,
        )
        for point in points
        if not point.reference
    ]
