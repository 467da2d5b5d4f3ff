"""What an attacker of tier T5 may end up with, evaluated only as far as the choice needs it."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from trap2.auditing.arena import Arena, Mixture, Split
from trap2.auditing.bootstrap import Floats
from trap2.auditing.contents import Content
from trap2.tasks.evaluation import Evaluation
from trap2.tasks.probe import Representation, probed_correct

Deltas = Iterable[tuple[str, Tensor]]


class Candidate:
    """A merged update, made when the ledger lacks an evaluation of it.

    Args:
        arena: Where it is evaluated.
        side: The side whose task is attacked.
        mixture: The merge, as it would be without training.
        deltas: Makes the merged update.
        rows: Labelled validation rows that were used up; the choice is made on the others.
        how: How its updates were trained, with all that decides what came of it; empty for those
            that were released.
        probed: Whether the side's task is read by a probe fitted on those rows, not by its head.
    """

    def __init__(
        self,
        arena: Arena,
        side: str,
        mixture: Mixture,
        deltas: Callable[[], Deltas],
        rows: int,
        how: Mapping[str, Any],
        probed: bool = False,
    ) -> None:
        self.coefficient, self.probed = mixture.coefficient_of(side), probed
        self._mixture, self._how = mixture, how
        self._arena, self._side, self._deltas, self._rows = arena, side, deltas, rows
        self._known: dict[tuple[str, Split], Evaluation] = {}

    def accuracy(self, member: str, split: Split) -> float:
        """Accuracy on a task; on the side's own validation rows without those used up."""
        if member != self._side:
            return self._evaluation(member, split).accuracy
        return float(self.scores(split).mean()) if self.probed else self._left(split).accuracy

    def scores(self, split: Split) -> Floats:
        """How well rows (N,) of the side's task are done; of validation rows those not used up."""
        if not self.probed:
            return self._left(split).scores.double().numpy()
        fit = self._evaluation(self._side, "validation")
        return probed_correct(fit, self._left(split), self._rows).astype(np.float64)

    def _left(self, split: Split) -> Evaluation:
        """The side's task on the rows that were not used up."""
        found = self._evaluation(self._side, split)
        return found if split == "test" else found.after(self._rows)

    def _evaluation(self, member: str, split: Split) -> Evaluation:
        if (member, split) not in self._known:
            evaluator = self._arena.members[member].evaluators[split]
            if self.probed and member == self._side:
                evaluator = copy.copy(evaluator)
                evaluator.model = Representation(self._arena.encoder)

            def run() -> Evaluation:
                with self._arena.holding(self._deltas(), self._mixture):
                    return evaluator()

            self._known[member, split] = self._arena.recorded(
                lambda: self._content(member, split), evaluator, run
            )
            self._arena.evaluations += 1
            self._arena.progress.tick()
        return self._known[member, split]

    def _content(self, member: str, split: Split) -> Content:
        probed = self.probed and member == self._side
        how = {**self._how, **({"read": "representation"} if probed else {})}
        contents = self._arena.contents
        plain = contents.of(self._mixture, member, split)
        return contents.taught(plain, self._side, how) if how else plain


@dataclass(frozen=True)
class Choice:
    """The candidate an attacker takes, on test rows.

    Attributes:
        coefficient: Its coefficient.
        admissible: Whether the partners keep their share in it.
        accuracy: Accuracy on the side's task.
        scores: How well each of its rows (N,) is done.
        unconstrained: The same for the best candidate when partners do not matter.
        partners: Accuracy on each partner's task.
    """

    coefficient: float
    admissible: bool
    accuracy: float
    scores: Floats
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
        scores=taken.scores("test"),
        unconstrained=ranked[0].accuracy(side, "test"),
        partners={p: taken.accuracy(p, "test") for p in floors},
    )
