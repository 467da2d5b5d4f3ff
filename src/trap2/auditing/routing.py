"""Models stored merged and used apart (`attacks/routed.py`): reported, and counted in no tier.

Each model is used near its own scale 1, so much of what it can do may be left, with a trap or
without. The hyper-parameters are those best for the attacked side's validation rows.
"""

from collections.abc import Iterator

from trap2.attacks.attack import load_attacks
from trap2.auditing.arena import CONTROL, RELEASE, Arena
from trap2.auditing.grid import settings
from trap2.auditing.mixture import Mixture, Split
from trap2.auditing.verdict import retained_skill
from trap2.schema import RoutingResult


def routes(arena: Arena) -> Iterator[tuple[Mixture, str, Split]]:
    """What is evaluated whatever comes out: every setting on the sides' validation rows."""
    for name in arena.spec.attacker.routing:
        for side in arena.sides:
            yield from ((mixture, side, "validation") for mixture in _tried(arena, name, side))


def routed(arena: Arena) -> list[RoutingResult]:
    """What every way to route leaves of the release, the control and the partners."""
    return [_result(arena, name) for name in arena.spec.attacker.routing]


def _result(arena: Arena, name: str) -> RoutingResult:
    arena.progress.say(f"{name}, routed")
    found = {side: _best(arena, name, side) for side in arena.sides}
    chosen, accuracy, retained = found[RELEASE]
    control = found.get(CONTROL)
    return RoutingResult(
        name=name,
        params=dict(chosen.params),
        accuracy=accuracy,
        retained=retained,
        partners={p: _to(arena, chosen, p) for p in arena.partners},
        control_params=dict(control[0].params) if control else None,
        control_accuracy=control[1] if control else None,
        control_retained=control[2] if control else None,
    )


def _best(arena: Arena, name: str, side: str) -> tuple[Mixture, float, float]:
    """The setting taken, and the side's accuracy and retained skill with it, on test rows."""
    chosen = max(
        _tried(arena, name, side),
        key=lambda mixture: arena.evaluate(mixture, side, "validation").accuracy,
    )
    base, alone = (arena.evaluate(arena.alone(side, s), side, "test").accuracy for s in (0.0, 1.0))
    accuracy = _to(arena, chosen, side)
    return chosen, accuracy, retained_skill(accuracy, base, alone)


def _tried(arena: Arena, name: str, side: str) -> Iterator[Mixture]:
    members, attack = (side, *arena.partners), load_attacks().get(name)
    for params in settings(attack, arena.spec.attacker.grids.get(name, {})):
        yield Mixture(name, members, attack.shared(1.0, len(members)), tuple(params.items()))


def _to(arena: Arena, mixture: Mixture, member: str) -> float:
    """Accuracy on a member's test rows with the model that its mask gives back."""
    others = (other for other in mixture.members if other != member)
    own = Mixture(mixture.attack, (member, *others), mixture.coefficients, mixture.params)
    return arena.evaluate(own, member, "test").accuracy
