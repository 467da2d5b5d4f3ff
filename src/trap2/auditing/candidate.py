"""What an attacker of tier T5 may end up with, evaluated only as far as the choice needs it."""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from trap2.auditing.arena import Arena, Split
from trap2.tasks.evaluation import Evaluation
from trap2.tasks.probe import Representation, probed_accuracy

Deltas = Iterable[tuple[str, Tensor]]


class Candidate:
    """A merged update, made anew each time it is evaluated.

    Args:
        arena: Where it is evaluated.
        side: The side whose task is attacked.
        coefficient: The shared coefficient of the merge.
        deltas: Makes the merged update.
        rows: Labelled validation rows that were used up; the choice is made on the others.
        probed: Whether the side's task is read by a probe fitted on those rows, not by its head.
    """

    def __init__(
        self,
        arena: Arena,
        side: str,
        coefficient: float,
        deltas: Callable[[], Deltas],
        rows: int,
        probed: bool = False,
    ) -> None:
        self.coefficient, self.probed = coefficient, probed
        self._arena, self._side, self._deltas, self._rows = arena, side, deltas, rows
        self._known: dict[tuple[str, Split], Evaluation] = {}

    def accuracy(self, member: str, split: Split) -> float:
        """Accuracy on a task; on the side's own validation rows without those used up."""
        found = self._evaluation(member, split)
        if member != self._side:
            return found.accuracy
        score = found if split == "test" else found.after(self._rows)
        if self.probed:
            return probed_accuracy(self._evaluation(member, "validation"), score, self._rows)
        return score.accuracy

    def _evaluation(self, member: str, split: Split) -> Evaluation:
        if (member, split) not in self._known:
            evaluator = self._arena.members[member].evaluators[split]
            if self.probed and member == self._side:
                evaluator = copy.copy(evaluator)
                evaluator.model = Representation(self._arena.encoder)
            with self._arena.live.merged(self._deltas()):
                self._known[member, split] = evaluator()
            self._arena.evaluations += 1
            self._arena.progress.tick()
        return self._known[member, split]


@dataclass(frozen=True)
class Choice:
    """The candidate an attacker takes, on test rows.

    Attributes:
        coefficient: Its coefficient.
        admissible: Whether the partners keep their share in it.
        accuracy: Accuracy on the side's task.
        unconstrained: The same for the best candidate when partners do not matter.
        partners: Accuracy on each partner's task.
    """

    coefficient: float
    admissible: bool
    accuracy: float
    unconstrained: float
    partners: dict[str, float]


def choose(
    candidates: Sequence[Candidate], side: str, floors: dict[str, float], keep: float
) -> Choice:
    """The best admissible candidate by validation rows; the best of all if none is admissible.

    Args:
        candidates: At least one.
        side: The side whose task is attacked.
        floors: What each partner's task reaches without the release, on validation rows.
        keep: Share of it that the partners must keep on average.
    """

    def kept(candidate: Candidate) -> float:
        shares = [candidate.accuracy(p, "validation") / max(1e-9, a) for p, a in floors.items()]
        return sum(shares) / len(shares)

    ranked = sorted(candidates, key=lambda c: -c.accuracy(side, "validation"))
    good = next((c for c in ranked if kept(c) >= keep), None)
    taken = good or ranked[0]
    return Choice(
        coefficient=taken.coefficient,
        admissible=good is not None,
        accuracy=taken.accuracy(side, "test"),
        unconstrained=ranked[0].accuracy(side, "test"),
        partners={p: taken.accuracy(p, "test") for p in floors},
    )
