"""The tuned attacker: chooses on validation rows, is scored once on test rows.

    T1  one shared coefficient, and the attack's own parameters, from a grid
    T2  the same, and the outputs are read through a map fitted on a few labelled rows
    T3  one coefficient per model or more, by coordinate descent or CMA-ES, read in the same way
    T4  as T1 and T2, with attacks that look at unlabelled rows of every task

It takes the mixture in which the protected task does best among those in which the partner tasks
keep, on average over partners, a stated share of what the same attack, tuned in the same way,
reaches without the protected update. Whoever gives that up could use the release alone. A mixture
in which the release has coefficient 0 leaves it out: it is no choice, for it keeps no skill of it.

A mixture is given up after a first look at the partners' rows that leaves no doubt (`share`).
After the grid the search goes on halfway between the best mixtures and their neighbours (`search`),
for a number of rounds. What is spent is counted in mixtures and not in seconds: the same attacker
does the same on every machine.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TypeAlias

from trap2.attacks.attack import DATA_TIER, equal, load_attacks
from trap2.auditing.arena import Arena, Mixture, Reading, Split
from trap2.auditing.evolution import evolved
from trap2.auditing.grid import settings, shared_coefficients, teams
from trap2.auditing.search import PEAKS, halfway, moved, peaks
from trap2.auditing.share import share_kept
from trap2.auditing.verdict import retained_skill
from trap2.errors import UserError
from trap2.recipes import AttackerSpec
from trap2.tasks.evaluation import Evaluation
from trap2.tasks.relabel import cross_validated_accuracy, relabelled_accuracy

Read: TypeAlias = Callable[[Mixture, Sequence[Reading]], list[Evaluation]]
"""How evaluations of a mixture are had."""

PENALTY = 2.0
"""Skill that a share of the partners is worth to CMA-ES where they keep less than they must."""


@dataclass(frozen=True)
class Catch:
    """What the attacker got out of one attack, on test rows.

    Attributes:
        mixture: The mixture chosen on validation rows.
        admissible: Whether the partners keep their share in it. Where no mixture is admissible
            the attacker leaves the release out, and `merged` is the base model's accuracy.
        merged: Accuracy on the protected task.
        unconstrained: The same for the best mixture when partners do not matter.
        partners: Accuracy on each partner task in the mixture.
        without: Accuracy the same attack reaches on each partner task without the release.
        evaluations: Model runs spent on the attack so far.
    """

    attack: str
    rows: int
    mixture: Mixture
    admissible: bool
    merged: float
    unconstrained: float
    partners: dict[str, float]
    without: dict[str, float]
    evaluations: int = 0


@dataclass
class Attacker:
    """One attacker against one side (the release or its control) of an arena."""

    arena: Arena
    side: str
    explored: dict[str, dict[Mixture, None]] = field(default_factory=dict)

    @property
    def _spec(self) -> AttackerSpec:
        return self.arena.spec.attacker

    def certain(self) -> Iterator[tuple[Mixture, str, Split]]:
        """The evaluations that its grids need, whatever they show."""
        spec = self._spec
        for name in dict.fromkeys((*spec.attacks, *spec.data_attacks, *spec.t3_attacks)):
            yield from self._gains(self._grid(name))
            for team in dict.fromkeys(m.members[1:] for m in self._grid(name)):
                if len(team) >= load_attacks().get(name).models[0]:  # else it is that partner alone
                    yield from self._of_partners(self._grid_of(name, team))

    def _gains(self, mixtures: Iterable[Mixture]) -> Iterator[tuple[Mixture, str, Split]]:
        """The side's own task in mixtures; those without it count only as others' neighbours."""
        for mixture in mixtures:
            if self._takes_part(mixture) or self._spec.refine:
                yield mixture, self.side, "validation"

    def _of_partners(
        self, mixtures: Iterable[Mixture], split: Split = "validation"
    ) -> Iterator[tuple[Mixture, str, Split]]:
        """The partners' tasks in mixtures."""
        return ((m, p, split) for m in mixtures for p in self._partners_in(m))

    def shared(self, name: str) -> Iterator[tuple[str, int, Catch]]:
        """T1 and T2 with one attack, or T4 with one that takes unlabelled rows.

        Yields:
            (tier, labelled rows used for re-labelling, catch).
        """
        self.arena.progress.say(f"{name} on the {self.side}, one coefficient")
        self._try(name, self._grid(name))
        attack = load_attacks().get(name)
        for rows in (0, *self._spec.relabel_rows):
            tier = DATA_TIER if attack.needs_data else "T2" if rows else "T1"
            if tier in attack.tiers:
                self._refine(name, rows)
                yield tier, rows, self._best(name, rows)

    def per_model(self, name: str) -> Iterator[tuple[str, int, Catch]]:
        """T3 with one attack: a search from several starts.

        Yields:
            ("T3", labelled rows used for re-labelling, catch).
        """
        self.arena.progress.say(f"{name} on the {self.side}, one coefficient per model")
        rows = max(self._spec.relabel_rows, default=0)
        self._try(name, self._grid(name))
        starts = [self._best(name, rows, score=False).mixture, *self._starts(name)]
        self._try(name, starts)
        taken = [start for start in dict.fromkeys(starts) if start in self.explored[name]]
        self._prepare_partners(taken)
        for start in taken:
            self._partners_keep(start)
        if "descent" in self._spec.t3_search:
            self._descend(name, rows)
        if "cma" in self._spec.t3_search:
            self._evolve(name, rows, starts[1:])
        for used in (0, *self._spec.relabel_rows):
            yield "T3", used, self._best(name, used)

    def _descend(self, name: str, rows: int) -> None:
        """Coordinate descent from the best start, then in smaller steps."""
        places = load_attacks().get(name).parts * (1 + len(self.arena.partners))
        for step in range(self._spec.t3_sweeps + self._spec.refine):
            for place in range(places):
                best = self._best(name, rows, score=False).mixture
                if step < self._spec.t3_sweeps:
                    self._try(name, moved(best, place, self._spec.t3_values))
                else:
                    had = [m.coefficients[place] for m in self.explored[name]]
                    self._try(name, halfway(best, moved(best, place, had)))

    def _evolve(self, name: str, rows: int, starts: Sequence[Mixture]) -> None:
        """CMA-ES around the best mixture so far, with the attack's own parameters kept."""
        best = self._best(name, rows, score=False).mixture
        floor = self._gain(self.arena.alone(self.side, 0.0), rows)

        def loss(point: tuple[float, ...]) -> float:
            mixture = replace(best, coefficients=point)
            self._try(name, [mixture])
            gain = self._gain(mixture, rows)
            if gain <= floor:  # no choice, whatever the partners keep
                return -gain + PENALTY
            lacking = max(0.0, self._spec.partners_keep - self._partners_keep(mixture))
            return -gain + PENALTY * lacking

        others = [m.coefficients for m in starts if m.params == best.params]
        budget, seed = self._spec.t3_evolved, self.arena.spec.seed
        evolved(best.coefficients, others, loss, budget=budget, seed=seed)

    def _try(self, name: str, mixtures: Iterable[Mixture]) -> None:
        """Add mixtures to those the attacker chooses from, as far as the budget goes."""
        explored = self.explored.setdefault(name, {})
        for mixture in mixtures:
            if self._spec.budget is None or len(explored) < self._spec.budget:
                explored[mixture] = None
        self.arena.prepare(self._gains(explored))

    def _refine(self, name: str, rows: int) -> None:
        """Look halfway between the best mixtures and their neighbours.

        The best are the best admissible one and the highest local optima, whatever they cost the
        partners: beside one that costs too much there may be one that does not.
        """
        for _ in range(self._spec.refine):
            explored = [*self.explored[name]]
            found = self._best(name, rows, score=False)
            optima = peaks(explored, lambda mixture: self._gain(mixture, rows))
            best = [found.mixture] if found.admissible else []
            best += [mixture for mixture in optima if self._takes_part(mixture)]
            around = [*dict.fromkeys(best)][:PEAKS]
            self._try(name, [between for m in around for between in halfway(m, explored)])

    def _takes_part(self, mixture: Mixture) -> bool:
        return mixture.coefficient_of(self.side) != 0

    def reference(self, name: str) -> Mixture:
        """What one attack makes of all partners without the release, tuned in the same way."""
        members = (self.side, *self.arena.partners)
        return self._without(name, Mixture(name, members, equal(1.0, len(members))))

    def frontier(self, name: str) -> Iterator[tuple[Mixture, float, float]]:
        """Every mixture of all models whose partners were evaluated, on validation rows.

        Yields:
            (mixture, retained skill re-labelled with the most rows allowed, share partners keep).
        """
        rows = max(self._spec.relabel_rows, default=0)
        base, top = (self._gain(self.arena.alone(self.side, s), rows) for s in (0.0, 1.0))
        everyone = (self.side, *self.arena.partners)
        for mixture in self.explored.get(name, {}):
            if mixture.members == everyone and self._known(mixture):
                kept = retained_skill(self._gain(mixture, rows), base, top)
                yield mixture, kept, self._partners_keep(mixture)

    def _known(self, mixture: Mixture) -> bool:
        look = self._looks(mixture)[0]
        return all(self.arena.is_known(mixture, p, look) for p in self._partners_in(mixture))

    def _starts(self, name: str) -> list[Mixture]:
        """The protected update kept at 1 and the partners shrunk, with each of the parameters."""
        members = (self.side, *self.arena.partners)
        parts = load_attacks().get(name).parts
        settings = [dict(m.params) for m in self.explored[name]] or [{}]
        unique = list(dict.fromkeys(tuple(s.items()) for s in settings))
        return [
            Mixture(name, members, tuple(c for c in (1.0, *others) for _ in range(parts)), params)
            for params in unique
            for others in ((c,) * len(self.arena.partners) for c in self._spec.t3_starts)
        ]

    def _grid(self, name: str) -> Iterator[Mixture]:
        """Every mixture of the shared grid with the protected update in it."""
        for members in teams(load_attacks().get(name), self.side, self.arena.partners):
            yield from self._grid_of(name, members)

    def _grid_of(self, name: str, members: tuple[str, ...]) -> Iterator[Mixture]:
        """Every mixture of the shared grid for these members."""
        attack = load_attacks().get(name)
        for params in settings(attack, self._spec.grids.get(name, {})):
            for value in shared_coefficients(attack, self._spec):
                coefficients = attack.shared(value, len(members))
                yield Mixture(name, members, coefficients, tuple(params.items()))

    def _best(self, name: str, rows: int, score: bool = True) -> Catch:
        """The best admissible mixture by validation rows, scored on test rows.

        Mixtures are visited from the best down, so partners are evaluated only until the first
        admissible one: the result is the same as if all had been. Where the release takes no part,
        nothing of it is kept.
        """
        candidates = filter(self._takes_part, self.explored[name])
        ranked = sorted(candidates, key=lambda m: -self._gain(m, rows))
        floor = self._gain(self.arena.alone(self.side, 0.0), rows)
        # Where it gains no more, leaving the release out is as good.
        worth = [mixture for mixture in ranked if self._gain(mixture, rows) > floor]
        keep = self._spec.partners_keep
        chosen = next((m for m in self._in_turn(worth) if self._partners_keep(m) >= keep), None)
        picked = chosen if chosen is not None else ranked[0]
        if not score:
            return Catch(name, rows, picked, chosen is not None, 0.0, 0.0, {}, {})
        return self._scored(name, rows, picked, chosen is not None, ranked[0])

    def _in_turn(self, mixtures: Sequence[Mixture]) -> Iterator[Mixture]:
        """One after another, with the partners' evaluations of the next few made at a time."""
        ready = self.arena.is_ready
        left = [
            m for m in mixtures if not all(map(ready, self._of_partners([m], self._looks(m)[0])))
        ]
        for mixture in mixtures:
            if left and mixture == left[0]:
                self._prepare_partners(left[: self.arena.width])
                left = left[self.arena.width :]
            yield mixture

    def _prepare_partners(self, mixtures: Sequence[Mixture]) -> None:
        """Have the crew make what `_partners_keep` will ask for."""
        if self.arena.crew is not None:
            looks = (self._of_partners([m], self._looks(m)[0]) for m in mixtures)
            self.arena.prepare(chain.from_iterable(looks))
            hopeful = [m for m in mixtures if not self._is_hopeless(m, self.arena.peek)]
            self.arena.prepare(self._of_partners(hopeful))

    def _scored(
        self, name: str, rows: int, picked: Mixture, admissible: bool, unconstrained: Mixture
    ) -> Catch:
        base = self.arena.alone(self.side, 0.0)
        without = self._without(name, picked)
        partners = self._partners_in(picked)
        read = {picked: partners, without: partners}
        for mixture in (picked if admissible else base, unconstrained):
            read[mixture] = [*read.get(mixture, []), self.side]
        self.arena.prepare((m, name, "test") for m, names in read.items() for name in names)
        for mixture, names in read.items():
            self.arena.read(mixture, [(name, "test") for name in names])
        return Catch(
            attack=name,
            rows=rows,
            mixture=picked,
            admissible=admissible,
            merged=self.test_accuracy(picked if admissible else base, rows),
            unconstrained=self.test_accuracy(unconstrained, rows),
            partners={p: self.arena.evaluate(picked, p, "test").accuracy for p in partners},
            without={p: self.arena.evaluate(without, p, "test").accuracy for p in partners},
        )

    def test_accuracy(self, mixture: Mixture, rows: int) -> float:
        """Accuracy on the protected task's test rows, re-labelled if `rows` is not 0."""
        test = self.arena.evaluate(mixture, self.side, "test")
        if rows == 0:
            return test.accuracy
        return relabelled_accuracy(
            self.arena.evaluate(mixture, self.side, "validation"), test, rows
        )

    def _gain(self, mixture: Mixture, rows: int) -> float:
        """What the attacker sees of the protected task while tuning, on validation rows."""
        return self.arena.remember(
            ("gain", mixture, self.side, rows),
            lambda: _validation_accuracy(
                self.arena.evaluate(mixture, self.side, "validation"), rows
            ),
        )

    def _partners_in(self, mixture: Mixture) -> list[str]:
        return [name for name in mixture.members if name != self.side]

    def _partners_keep(self, mixture: Mixture) -> float:
        """The share partners keep in a mixture; of the first rows, if they leave no doubt."""
        first, last = self._looks(mixture)
        return self._share(mixture, first if self._is_hopeless(mixture) else last)[0]

    def _is_hopeless(self, mixture: Mixture, read: Read | None = None) -> bool:
        """Whether a first look is enough to say that partners keep too little."""
        share, doubt = self._share(mixture, self._looks(mixture)[0], read)
        return share + doubt < self._spec.partners_keep

    def _share(
        self, mixture: Mixture, split: Split, read: Read | None = None
    ) -> tuple[float, float]:
        partners = self._partners_in(mixture)
        without = self._without(mixture.attack, mixture)
        return share_kept(
            (read or self.arena.read)(mixture, [(p, split) for p in partners]),
            self.arena.read(without, [(p, "validation") for p in partners]),
        )

    def _looks(self, mixture: Mixture) -> tuple[Split, Split]:
        """The first and the last look at a mixture: where merging is dear, all is read at once."""
        dear = load_attacks().get(mixture.attack).needs_data
        return "validation" if dear else "early", "validation"

    def _without(self, name: str, mixture: Mixture) -> Mixture:
        """The same attack on the same partners without the release, tuned in the same way."""
        partners = tuple(self._partners_in(mixture))
        if len(partners) < load_attacks().get(name).models[0]:
            return self.arena.alone(partners[0])

        def gain(mixture: Mixture) -> float:
            found = self.arena.read(mixture, [(p, "validation") for p in partners])
            return sum(evaluation.accuracy for evaluation in found)

        def tuned() -> Mixture:
            tried = dict.fromkeys(self._grid_of(name, partners))
            for _ in range(self._spec.refine):
                self.arena.prepare(self._of_partners(tried))
                for mixture in peaks([*tried], gain)[:PEAKS]:
                    tried |= dict.fromkeys(halfway(mixture, [*tried]))
            self.arena.prepare(self._of_partners(tried))
            return max(tried, key=gain)

        return self.arena.remember(("without", name, partners), tuned)


def _validation_accuracy(evaluation: Evaluation, rows: int) -> float:
    """Raw accuracy, or re-labelled: fitted on the first rows and read on the rest, or crosswise."""
    if rows == 0:
        return evaluation.accuracy
    count = len(evaluation)
    if rows > count:
        raise UserError(
            f"re-labelling with {rows} rows needs as many validation rows, there are {count}; "
            "raise validation_rows, give more rows, or lower relabel_rows"
        )
    if rows > count // 2:
        return cross_validated_accuracy(evaluation, rows)
    return relabelled_accuracy(evaluation, evaluation.after(rows), rows)
