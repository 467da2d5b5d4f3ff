"""The tuned attacker on tables of accuracies, where every choice can be checked by brute force."""

import random
from collections.abc import Callable
from contextlib import contextmanager
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trap2.attacks.attack import ATTACKS, TIERS, Attack, equal, load_attacks
from trap2.auditing.arena import CONTROL, RELEASE, WHOLE, Arena, Mixture
from trap2.auditing.attacker import Attacker
from trap2.auditing.plan import check_plan
from trap2.errors import UserError
from trap2.progress import SILENT
from trap2.recipes import AttackerSpec
from trap2.tasks.classes import most_frequent
from trap2.tasks.evaluation import Classification

ROWS = 60
LABELS = torch.tensor(random.Random(0).choices(range(3), k=ROWS))
Score = Callable[[Mixture, str, str], float]


def answers(accuracy: float, shift: int = 0) -> Classification:
    """Outputs that are right on this share of the rows, with the labels shifted when asked for."""
    right = torch.tensor([int((i + 1) * accuracy) > int(i * accuracy) for i in range(ROWS)])
    said = torch.where(right, LABELS + shift, LABELS + shift + 1) % 3
    return Classification(5.0 * torch.nn.functional.one_hot(said, 3).float(), LABELS)


def first(found: Classification, rows: int) -> Classification:
    """The same of the first rows."""
    return Classification(found.outputs[:rows], found.labels[:rows])


class Table(Arena):
    """An arena whose evaluations come from a function of the mixture instead of a model."""

    def __init__(self, score: Score, partners: int = 2, shift: Any = None, **spec: Any) -> None:
        grid = {} if "suite" in spec else {"coefficients": [0.0, 0.5, 1.0], "refine": 0}
        settings = {"relabel_rows": [], **grid, **spec}
        self.spec: Any = SimpleNamespace(attacker=AttackerSpec.model_validate(settings))
        self.progress, self.evaluations = SILENT, 0
        self.partners = tuple(f"p{i}" for i in range(1, partners + 1))
        self.sides = (RELEASE,)
        self._known, self._memory, self._ahead = {}, {}, set()
        self.ledger = self.crew = None

        def evaluator(member: str, split: str, rows: int) -> Callable[[], Classification]:
            moved = shift if shift and member == RELEASE else lambda mixture: 0
            return lambda: first(answers(score(self.now, member, split), moved(self.now)), rows)

        self.members: Any = {
            member: SimpleNamespace(
                evaluators={split: evaluator(member, split, ROWS) for split in WHOLE}
                | {"early": evaluator(member, "validation", ROWS // 4)}
            )
            for member in (RELEASE, *self.partners)
        }

    @contextmanager
    def _merged(self, mixture: Mixture):
        self.now = mixture
        yield


def caught(arena: Arena, name: str = "task_arithmetic", power: str = "shared") -> dict:
    """Everything the attacker gets with one attack: {(tier, rows): catch}."""
    found = getattr(Attacker(arena, RELEASE), power)(name)
    return {(tier, rows): catch for tier, rows, catch in found}


def drawn(seed: int, levels: int = 7) -> Score:
    """Accuracies at random, but the same for the same mixture; few levels, so that many tie."""

    def score(mixture: Mixture, member: str, split: str) -> float:
        alone = mixture.members == (RELEASE,) and mixture.coefficients == (0.0,)
        if alone:
            return 0.3
        return random.Random(f"{seed} {mixture} {member} {split}").randrange(1, levels) / levels

    return score


def accuracy(score: Score, mixture: Mixture, member: str, split: str = "validation") -> float:
    return answers(score(mixture, member, split)).accuracy


def brute_force(score: Score, name: str, mixtures: list[Mixture], grid: list[Mixture]):
    """The best admissible mixture, every mixture and every partner looked at; None if none is."""
    partners = [m for m in mixtures[0].members if m != RELEASE]
    without = max(grid, key=lambda m: sum(accuracy(score, m, p) for p in partners))

    def keep(mixture: Mixture) -> float:
        shares = [accuracy(score, mixture, p) / accuracy(score, without, p) for p in partners]
        return sum(shares) / len(shares)

    good = [
        m
        for m in mixtures
        if m.coefficients[0] != 0 and keep(m) >= 0.95 and accuracy(score, m, RELEASE) > 0.3
    ]
    return max(good, key=lambda m: accuracy(score, m, RELEASE), default=None)


@given(st.integers(0, 10**6))
def test_the_choice_is_that_of_brute_force_over_all_mixtures(seed):
    score, densities, values = drawn(seed), (0.2, 1.0), (0.0, 0.5, 1.0, 1.5)
    arena = Table(score, coefficients=list(values), grids={"ties": {"density": [*densities]}})
    catch = caught(arena, "ties")["T1", 0]

    def grid(members: tuple[str, ...]) -> list[Mixture]:
        return [
            Mixture("ties", members, (c,) * len(members), (("density", d),))
            for d, c in product(densities, values)
        ]

    mixtures = grid((RELEASE, "p1", "p2"))
    expected = brute_force(score, "ties", mixtures, grid(("p1", "p2")))
    assert catch.admissible == (expected is not None)
    if expected is None:
        assert catch.merged == pytest.approx(0.3)
        return
    assert catch.mixture == expected
    assert catch.merged == pytest.approx(accuracy(score, expected, RELEASE, "test"))
    taking_part = [m for m in mixtures if m.coefficients[0] != 0]
    best = max(taking_part, key=lambda m: accuracy(score, m, RELEASE))
    assert catch.unconstrained == pytest.approx(accuracy(score, best, RELEASE, "test"))


@given(st.integers(0, 10**6))
def test_a_second_attacker_makes_the_same_choices(seed):
    first, second = (caught(Table(drawn(seed)), power="per_model") for _ in range(2))
    assert first == second


def only(level: dict[tuple[float, ...], float], partners: float = 0.9, base: float = 0.4) -> Score:
    """The protected task at some levels for some coefficients, elsewhere at the base's."""

    def score(mixture: Mixture, member: str, split: str) -> float:
        return level.get(mixture.coefficients, base) if member == RELEASE else partners

    return score


def test_partners_are_looked_at_from_the_best_mixture_down_and_no_further():
    arena = Table(only({(0.5,) * 3: 0.7, (1.0,) * 3: 0.8}))
    catch = caught(arena)["T1", 0]
    assert catch.mixture.coefficients == (1.0, 1.0, 1.0)
    half = Mixture("task_arithmetic", (RELEASE, "p1", "p2"), (0.5, 0.5, 0.5))
    assert arena.is_known(half, RELEASE, "validation")
    assert not arena.is_known(half, "p1", "validation")


def test_a_mixture_that_ruins_its_partners_is_given_up_after_the_first_rows():
    def score(mixture, member, split):
        if member == RELEASE:
            return {0.5: 0.7, 1.0: 0.8}.get(mixture.coefficient_of(RELEASE), 0.4)
        return {0.5: 0.8, 1.0: 0.1}.get(mixture.coefficient_of(RELEASE), 0.9)

    arena = Table(score, partners=8, partners_keep=0.8)
    catch = caught(arena)["T1", 0]
    members = (RELEASE, *arena.partners)
    ruined, spared = (Mixture("task_arithmetic", members, (c,) * 9) for c in (1.0, 0.5))
    assert catch.mixture == spared
    assert catch.unconstrained == pytest.approx(0.8)
    for partner in arena.partners:
        assert arena.is_known(ruined, partner, "early")
        assert not arena.is_known(ruined, partner, "validation")
        assert arena.is_known(spared, partner, "validation")


@given(st.integers(0, 10**6))
def test_what_is_given_up_early_changes_no_choice(seed):
    def score(mixture, member, split):
        if member != RELEASE and RELEASE in mixture.members:
            return random.Random(f"{seed} {mixture} {member}").choice([0.05, 0.5, 0.95])
        return drawn(seed)(mixture, member, split)

    spec = {"partners": 4, "coefficients": [0.2, 0.4, 0.6, 0.8, 1.0], "partners_keep": 0.9}
    given_up, looked_at = Table(score, **spec), Table(score, **spec)
    with pytest.MonkeyPatch.context() as patch:
        chosen = caught(given_up)
        patch.setattr(Attacker, "_is_hopeless", lambda *_: False)
        assert caught(looked_at) == chosen


def test_a_mixture_is_merged_once_for_all_of_its_partners():
    arena, merged = Table(only({(1.0,) * 4: 0.8}), partners=3), []
    inside = arena._merged
    arena._merged = lambda mixture: merged.append(mixture) or inside(mixture)  # type: ignore[method-assign]
    caught(arena)
    chosen = Mixture("task_arithmetic", (RELEASE, *arena.partners), (1.0,) * 4)
    looks = ("its own rows", "a first look", "all rows", "test rows", "its own test rows")
    assert merged.count(chosen) <= len(looks)


def test_validation_rows_choose_and_test_rows_score():
    levels = {"validation": {(0.5,) * 3: 0.9, (1.0,) * 3: 0.6}, "test": {(0.5,) * 3: 0.5}}

    def score(mixture, member, split):
        return only(levels[split])(mixture, member, split)

    catch = caught(Table(score))["T1", 0]
    assert catch.mixture.coefficients == (0.5, 0.5, 0.5)
    assert catch.merged == pytest.approx(0.5)
    assert catch.partners == {"p1": pytest.approx(0.9), "p2": pytest.approx(0.9)}


def test_the_first_of_equally_good_mixtures_is_taken():
    catch = caught(Table(only({(0.5,) * 3: 0.8, (1.0,) * 3: 0.8})))["T1", 0]
    assert catch.mixture.coefficients == (0.5, 0.5, 0.5)


def needy(mixture: Mixture, member: str, split: str) -> float:
    """Partners want a coefficient of 1 for themselves; the release works at 0.5 only."""
    own = mixture.coefficient_of(member)
    if member == RELEASE:
        return 0.8 if own == 0.5 else 0.4
    return 0.9 if own == 1.0 else 0.5


def test_where_no_mixture_is_admissible_the_release_is_left_out():
    catch = caught(Table(needy))["T1", 0]
    assert not catch.admissible
    assert catch.merged == pytest.approx(0.4)
    assert catch.unconstrained == pytest.approx(0.8)
    assert catch.partners["p1"] == pytest.approx(0.5)
    assert catch.without == {"p1": pytest.approx(0.9), "p2": pytest.approx(0.9)}


def test_the_share_partners_must_keep_is_a_setting():
    catch = caught(Table(needy, partners_keep=0.5))["T1", 0]
    assert catch.admissible
    assert catch.merged == pytest.approx(0.8)


def test_a_mixture_no_better_than_the_base_is_no_catch():
    catch = caught(Table(only({}, base=0.4)))["T1", 0]
    assert not catch.admissible
    assert catch.merged == catch.unconstrained == pytest.approx(0.4)


def stubborn(mixture: Mixture, member: str, split: str) -> float:
    """The release works at coefficient 1 beside partners below a half, which suits them too."""
    others = [c for m, c in zip(mixture.members, mixture.coefficients) if m != RELEASE]  # noqa: B905
    if member == RELEASE:
        return 0.9 if mixture.coefficient_of(RELEASE) == 1 and max(others, default=0) < 0.5 else 0.4
    return 0.9 if mixture.coefficient_of(member) > 0.3 else 0.5


def test_one_coefficient_per_model_keeps_the_release_at_1_and_shrinks_the_partners():
    arena = Table(stubborn, t3_values=[0.0, 0.5, 1.0])
    shared = caught(arena)["T1", 0]
    assert not shared.admissible
    per_model = caught(arena, power="per_model")["T3", 0]
    assert per_model.admissible
    assert per_model.mixture.coefficients == (1.0, 0.4, 0.4)
    assert per_model.merged == pytest.approx(0.9)


def test_coordinate_descent_finds_what_no_start_has():
    def score(mixture, member, split):
        c = mixture.coefficients
        level = {(0.5, 0.5, 0.5): 0.6, (0.3, 0.5, 0.5): 0.7, (0.3, 0.5, 0.7): 0.8}
        return level.get(c, 0.4) if member == RELEASE else 0.9

    spec = {"t3_values": [0.3, 0.5, 0.7]}
    assert caught(Table(score), power="shared")["T1", 0].merged == pytest.approx(0.6)
    best = caught(Table(score, **spec), power="per_model")["T3", 0]
    assert best.mixture.coefficients == (0.3, 0.5, 0.7)
    assert best.merged == pytest.approx(0.8)


def test_the_frontier_holds_mixtures_of_all_models_with_skill_between_base_and_standalone():
    arena = Table(stubborn, partners=1, t3_values=[0.0, 1.0])
    attacker = Attacker(arena, RELEASE)
    list(attacker.shared("task_arithmetic"))
    list(attacker.per_model("task_arithmetic"))
    points = list(attacker.frontier("task_arithmetic"))
    assert {m.members for m, _, _ in points} == {(RELEASE, "p1")}
    found = {m.coefficients: (round(skill, 6), round(keep, 6)) for m, skill, keep in points}
    assert found[1.0, 0.4] == (1.0, 1.0)
    assert found[1.0, 0.8] == (0.0, 1.0)
    assert found[1.0, 0.2][0] == 1.0
    assert found[1.0, 0.2][1] < 0.6
    assert list(attacker.frontier("ties")) == []


def test_relabelling_sees_through_shifted_answers():
    def shift(mixture):
        return 1 if RELEASE in mixture.members and mixture.coefficients[0] == 0.5 else 0

    score = only({(0.5,) * 3: 1.0, (1.0,) * 3: 0.6})
    catches = caught(Table(score, shift=shift, relabel_rows=[10, 40]))
    assert list(catches) == [("T1", 0), ("T2", 10), ("T2", 40)]
    assert catches["T1", 0].mixture.coefficients == (1.0, 1.0, 1.0)
    assert catches["T1", 0].merged == pytest.approx(0.6)
    for rows in (10, 40):
        assert catches["T2", rows].rows == rows
        assert catches["T2", rows].mixture.coefficients == (0.5, 0.5, 0.5)
        assert catches["T2", rows].merged == 1.0


def test_more_labelled_rows_than_there_are_is_refused():
    with pytest.raises(UserError, match=r"re-labelling with 99 rows needs .* there are 60; raise"):
        caught(Table(only({}), relabel_rows=[99]))


def test_slerp_merges_the_release_with_one_partner_at_a_time():
    arena = Table(only({(0.5, 0.5): 0.7}), coefficients=[-0.5, 0.0, 0.5, 1.0, 1.5])
    attacker = Attacker(arena, RELEASE)
    catches = list(attacker.shared("slerp"))
    assert [m.members for m in attacker.explored["slerp"]] == [(RELEASE, "p1")] * 3 + [
        (RELEASE, "p2")
    ] * 3
    assert {m.coefficients for m in attacker.explored["slerp"]} == {(1, 0), (0.5, 0.5), (0, 1)}
    catch = catches[0][2]
    assert catch.mixture.members == (RELEASE, "p1")
    assert list(catch.partners) == ["p1"]
    assert catch.without == {"p1": pytest.approx(0.9)}


def test_one_partner_alone_is_compared_with_itself_where_an_attack_takes_two():
    def score(mixture, member, split):
        if member == RELEASE:
            return 0.8
        return 0.9 if mixture == Mixture("task_arithmetic", ("p1",), (1.0,)) else 0.7

    catch = caught(Table(score, partners=1), "slerp")["T1", 0]
    assert catch.without == {"p1": pytest.approx(0.9)}
    assert not catch.admissible


def test_with_one_partner_the_comparison_is_that_partner_under_the_same_attack():
    arena = Table(only({(1.0, 1.0): 0.8}), partners=1)
    catch = caught(arena)["T1", 0]
    assert catch.mixture.members == (RELEASE, "p1")
    assert catch.admissible
    tried = Mixture("task_arithmetic", ("p1",), (0.5,))
    assert arena.is_known(tried, "p1", "validation")


def test_grids_take_the_place_of_an_attacks_own_values():
    arena = Table(only({}), grids={"ties": {"density": [0.3]}, "dare_ties": {"drop": [0.4]}})
    attacker = Attacker(arena, RELEASE)
    for name, expected in (
        ("ties", {(("density", 0.3),)}),
        ("dare_ties", {(("drop", 0.4), ("seed", 0))}),
    ):
        list(attacker.shared(name))
        assert {m.params for m in attacker.explored[name]} == expected
    own = Attacker(Table(only({})), RELEASE)
    list(own.shared("ties"))
    assert {dict(m.params)["density"] for m in own.explored["ties"]} == {0.1, 0.2, 0.5, 1.0}


def test_without_shared_coefficients_each_attack_has_its_own():
    attacker = Attacker(
        Table(only({}), coefficients=None, grids={"ties": {"density": [1.0]}}), RELEASE
    )
    for name in ("task_arithmetic", "ties", "slerp"):
        list(attacker.shared(name))
        tried = dict.fromkeys(m.coefficients[-1] for m in attacker.explored[name])
        assert tuple(tried) == load_attacks().get(name).coefficients


def test_coefficients_and_starts_can_be_given_by_attack():
    given = {"coefficients": {"ties": [0.0, 2.5]}, "grids": {"ties": {"density": [1.0]}}}
    attacker = Attacker(Table(only({}), t3_starts=[0.25], **given), RELEASE)
    for name, expected in (
        ("ties", (0.0, 2.5)),
        ("task_arithmetic", load_attacks().get("task_arithmetic").coefficients),
    ):
        list(attacker.shared(name))
        assert tuple(dict.fromkeys(m.coefficients[0] for m in attacker.explored[name])) == expected
    list(attacker.per_model("task_arithmetic"))
    assert (1.0, 0.25, 0.25) in {m.coefficients for m in attacker.explored["task_arithmetic"]}


def three_or_more(monkeypatch, tiers=TIERS, models: tuple[int, int | None] = (3, None)) -> None:
    entry = Attack(
        "mine", "https://example.org", tiers, lambda: [], {}, models, False, (1.0,), equal
    )
    load_attacks()
    monkeypatch.setitem(ATTACKS._entries, "mine", entry)


def plan(models: int = 3, **spec: Any) -> None:
    check_plan(AttackerSpec.model_validate(spec), models)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"attacks": ["tise"]}, "no attack is called 'tise'; did you mean 'ties'\\? known: "),
        (
            {"t3_attacks": ["nope"]},
            "no attack is called 'nope'; known: adamerging, .*, mine, .*, thinned, ties, ",
        ),
        ({"grids": {"tie": {}}}, "no attack is called 'tie'; did you mean 'ties'"),
        (
            {"grids": {"ties": {"densty": [1]}}},
            "attacker.grids.ties.densty is no parameter of 'ties'; it has: density",
        ),
        ({"coefficients": {"tie": [1.0]}}, "no attack is called 'tie'; did you mean 'ties'"),
        (
            {"attacks": [], "t3_attacks": []},
            "recovery and routing are all empty, so nothing would be tried; known: ",
        ),
        (
            {"attacks": ["regmean"]},
            "attacker.attacks has 'regmean', which takes unlabelled rows; move it to attacker.data",
        ),
        (
            {"data_attacks": ["ties"]},
            "data_attacks has 'ties', which takes no unlabelled rows; move it to attacker.attacks",
        ),
        ({"attacks": ["slerp"], "coefficients": [1.5]}, "'slerp' takes coefficients from 0 to 1"),
        ({"t3_attacks": ["slerp"]}, "'slerp' cannot merge 3 models with one coefficient each"),
        ({"attacks": ["mine"], "models": 2}, "'mine' merges 3 models or more, here are 2; give"),
    ],
)
def test_a_plan_that_cannot_be_carried_out_is_refused(monkeypatch, spec, message):
    three_or_more(monkeypatch)
    with pytest.raises(UserError, match=message):
        plan(**spec)


def test_a_plan_that_can_be_carried_out_is_not():
    assert plan() is None
    assert plan(models=2) is None
    assert plan(attacks=[], t3_attacks=["ties"], coefficients=[1.5]) is None
    assert plan(attacks=["slerp"], t3_attacks=[]) is None
    assert plan(attacks=[], t3_attacks=[], data_attacks=["regmean"]) is None
    assert plan(attacks=[], t3_attacks=[], recovery=["probe"]) is None


def test_an_attack_of_one_tier_is_tried_in_no_other(monkeypatch):
    three_or_more(monkeypatch, tiers=("T1",))
    arena = Table(only({}), relabel_rows=[10])
    assert list(caught(arena, "mine")) == [("T1", 0)]
    with pytest.raises(UserError, match="'mine' cannot merge 3 models with one coefficient each"):
        plan(t3_attacks=["mine"])


def test_an_attack_on_at_most_two_models_may_merge_one(monkeypatch):
    three_or_more(monkeypatch, models=(1, 2))
    catch = caught(Table(only({(1.0, 1.0): 0.8})), "mine")["T1", 0]
    assert catch.mixture.members == (RELEASE, "p1")
    assert catch.admissible


def test_the_control_is_attacked_in_the_same_way():
    arena = Table(only({(1.0,) * 3: 0.8}))
    arena.members[CONTROL] = arena.members[RELEASE]
    score = only({(1.0,) * 3: 0.7})

    def evaluator(split):
        return lambda: answers(
            0.4 if len(arena.now.members) == 1 else score(arena.now, RELEASE, split)
        )

    arena.members[CONTROL] = SimpleNamespace(
        evaluators={split: evaluator(split) for split in ("validation", "test")}
    )
    (_, _, catch), *_ = Attacker(arena, CONTROL).shared("task_arithmetic")
    assert catch.mixture.members == (CONTROL, "p1", "p2")
    assert catch.merged == pytest.approx(0.7, abs=0.02)


def test_chance_is_the_share_of_the_most_frequent_label():
    assert most_frequent([0, 2, 2, 1, 2]) == pytest.approx(0.6)


def valleys(mixture: Mixture, member: str, split: str) -> float:
    """Skill in a wide valley at 1 that costs the partners, and in a narrow one at 0.3."""
    own = mixture.coefficient_of(RELEASE)
    if member == RELEASE:
        wide, narrow = max(0.0, 0.9 - abs(own - 1.0)), max(0.0, 0.7 - 8 * abs(own - 0.3))
        return max(0.2, wide, narrow)
    return 0.9 if own < 0.4 else 0.5


def test_the_search_goes_on_beside_the_second_optimum_too():
    values = [0.0, 0.25, 0.5, 0.75, 1.0, 1.25]
    grid = caught(Table(valleys, coefficients=values))["T1", 0]
    assert grid.mixture.coefficients == (0.25,) * 3
    refined = caught(Table(valleys, coefficients=values, refine=2))["T1", 0]
    assert refined.mixture.coefficients == (0.3125,) * 3
    assert refined.merged == pytest.approx(0.6, abs=0.02)
    assert refined.unconstrained == pytest.approx(0.9)


def test_without_refinement_only_the_grid_is_tried():
    arena = Table(valleys)
    attacker = Attacker(arena, RELEASE)
    list(attacker.shared("task_arithmetic"))
    assert {m.coefficients[0] for m in attacker.explored["task_arithmetic"]} == {0.0, 0.5, 1.0}


def test_what_the_partners_reach_without_the_release_is_refined_in_the_same_way():
    def score(mixture, member, split):
        return 0.4 if member == RELEASE else max(0.1, 0.9 - abs(mixture.coefficients[-1] - 0.3))

    coarse, fine = (caught(Table(score, refine=rounds))["T1", 0] for rounds in (0, 2))
    assert coarse.without["p1"] == pytest.approx(0.7, abs=0.02)
    assert fine.without["p1"] == pytest.approx(0.85, abs=0.03)


def test_one_coefficient_per_model_is_refined_place_by_place():
    def score(mixture, member, split):
        off = sum(abs(c - t) for c, t in zip(mixture.coefficients, (0.9, 0.4, 0.5)))  # noqa: B905
        return max(0.1, 0.8 - off) if member == RELEASE else 0.9

    spec = {"t3_values": [0.2, 0.4, 0.6, 0.8, 1.0], "coefficients": [0.6]}
    coarse, fine = (
        caught(Table(score, refine=rounds, **spec), power="per_model")["T3", 0] for rounds in (0, 1)
    )
    assert coarse.mixture.coefficients != fine.mixture.coefficients == (0.9, 0.4, 0.5)


def tempting(mixture: Mixture, member: str, split: str) -> float:
    """The protected task does well without the release: its partners help the base."""
    if member == RELEASE:
        return 0.4 if mixture.coefficient_of(RELEASE) else 0.4 + 0.3 * (len(mixture.members) > 1)
    return 0.9


def test_a_mixture_that_leaves_the_release_out_is_no_catch():
    arena = Table(tempting, t3_values=[0.0, 0.5, 1.0], refine=1)
    for (_tier, _), catch in {**caught(arena), **caught(arena, power="per_model")}.items():
        assert not catch.admissible
        assert catch.merged == pytest.approx(0.4)
        assert catch.mixture.coefficient_of(RELEASE) != 0
        assert catch.unconstrained == pytest.approx(0.4)


def test_a_place_on_the_way_at_which_nothing_of_the_release_is_left_is_no_catch():
    catch = caught(Table(tempting, coefficients=[0.5, 1.0]), "slerp")["T1", 0]
    assert not catch.admissible
    assert catch.mixture.coefficients == (0.5, 0.5)


def test_the_budget_counts_mixtures_and_ends_the_search():
    spec = {"coefficients": [0.0, 0.5, 1.0], "refine": 3, "t3_values": [0.0, 0.3, 0.6, 0.9]}
    arena = Table(valleys, budget=9, **spec)
    attacker = Attacker(arena, RELEASE)
    list(attacker.shared("task_arithmetic"))
    list(attacker.per_model("task_arithmetic"))
    first = [*attacker.explored["task_arithmetic"]]
    assert len(first) == 9
    free = Attacker(Table(valleys, **spec), RELEASE)
    list(free.shared("task_arithmetic"))
    list(free.per_model("task_arithmetic"))
    assert len(free.explored["task_arithmetic"]) > 9
    assert first == [*free.explored["task_arithmetic"]][:9]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"attacks": ["task_arithmetic"], "coefficients": [0.0]},
            "'task_arithmetic' leaves the release out at every coefficient given; add others to",
        ),
        (
            {"attacks": ["slerp"], "coefficients": [1.0], "t3_attacks": []},
            "'slerp' leaves the release out at every coefficient given; add others to",
        ),
        (
            {"attacks": ["slerp"], "coefficients": [0.2, 0.5], "budget": 3, "t3_attacks": []},
            "attacker.budget=3 does not cover the grid of 'slerp', which has 4 mixtures; raise it",
        ),
    ],
)
def test_a_grid_with_nothing_to_choose_from_is_refused(spec, message):
    with pytest.raises(UserError, match=message):
        plan(**spec)
    if "budget" in spec:
        assert plan(**{**spec, "budget": 4}) is None


@pytest.mark.parametrize("name", ["quick", "standard-v1"])
def test_every_suite_can_be_carried_out(name):
    assert plan(suite=name) is None
    assert plan(suite=name, models=2) is None


def test_a_quick_audit_reads_the_rows_at_most_400_times():
    arena = Table(drawn(0, 30), partners=3, relabel_rows=[10, 30], suite="quick")
    arena.members[CONTROL] = arena.members[RELEASE]
    for side in (RELEASE, CONTROL):
        attacker = Attacker(arena, side)
        for name in arena.spec.attacker.attacks:
            list(attacker.shared(name))
        for name in arena.spec.attacker.t3_attacks:
            list(attacker.per_model(name))
    rows = sum(len(found) for found in arena._known.values())
    assert rows / ROWS < 360  # the references come on top


@pytest.mark.parametrize("name", ["slerp", "nuslerp", "task_arithmetic", "karcher"])
def test_what_is_certain_can_be_merged_whatever_an_attack_takes(name):
    """Workers merge all of it ahead: a pair without the release is no pair."""
    fewest = load_attacks().get(name).models[0]
    attacker = Attacker(Table(only({}), partners=3, attacks=[name], t3_attacks=[]), RELEASE)
    sizes = {len(mixture.members) for mixture, _, _ in attacker.certain()}
    assert sizes
    assert min(sizes) >= fewest
