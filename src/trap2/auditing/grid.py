"""The grid of an attack with one shared coefficient: who is merged, and with which values."""

from typing import Any

from trap2.attacks.attack import Attack, equal, load_attacks
from trap2.errors import UserError
from trap2.recipes import AttackerSpec


def teams(attack: Attack, side: str, partners: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Who is merged with whom: all together, or pairs for attacks that take fewer models."""
    high = attack.models[1]
    if high is None or high > len(partners):
        return [(side, *partners)]
    return [(side, partner) for partner in partners]


def shared_coefficients(attack: Attack, spec: AttackerSpec) -> list[float]:
    """The shared coefficients tried; places on a way from one model to another end at 0 and 1."""
    given = spec.coefficients
    chosen = given.get(attack.name) if isinstance(given, dict) else given
    values = chosen or attack.coefficients
    between = attack.spread is not equal
    return [value for value in values if not between or 0 <= value <= 1]


def own_coefficients(attack: Attack, spec: AttackerSpec) -> list[float]:
    """The release's own coefficient at each of the shared coefficients."""
    models = max(2, attack.models[0])
    return [attack.spread(value, models)[0] for value in shared_coefficients(attack, spec)]


def settings(attack: Attack, grid: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Combinations of the attack's own parameters, on the given grid or its own."""
    unknown = [key for key in grid if key not in attack.grid]
    if unknown:
        raise UserError(
            f"attacker.grids.{attack.name}.{unknown[0]} is no parameter of '{attack.name}'; "
            f"it has: {', '.join(attack.grid) or 'none'}"
        )
    combinations: list[dict[str, Any]] = [{}]
    for key, values in attack.grid.items():
        chosen = [_typed(attack, key, value) for value in grid.get(key) or values]
        combinations = [{**c, key: v} for c in combinations for v in chosen]
    return combinations


def _typed(attack: Attack, key: str, value: Any) -> Any:
    """A value from a file, where all numbers are floats, as what the attack's own grid holds.

    Attacks on weights alone take floats for whole numbers, and draw other masks for seed 0.0 than
    for seed 0: what frozen suites draw must stay. Steps of a training must be whole.
    """
    return type(attack.grid[key][0])(value) if attack.needs_data else value


def tried(name: str, spec: AttackerSpec) -> dict[str, list[float]]:
    """The values of an attack's T1 and T2 grid, as the record keeps them: see `Evidence.grids`."""
    attack = load_attacks().get(name)
    place = "coefficient" if attack.spread is equal else "place"
    shared = own_coefficients(attack, spec)
    given = spec.grids.get(name, {})
    own = {key: given.get(key) or values for key, values in attack.grid.items()}
    return {place: shared} | {
        key: [float(value) for value in values if not isinstance(value, str)]
        for key, values in own.items()
    }


def check_budget(attack: Attack, spec: AttackerSpec, models: int) -> None:
    """Refuse a budget that ends within the grid: half a grid has no sides to choose from.

    Args:
        attack: The attack.
        spec: What the attacker shall try.
        models: How many models there are to merge.

    Raises:
        UserError: It does.
    """
    own = len(settings(attack, spec.grids.get(attack.name, {})))
    together = len(teams(attack, "", ("",) * (models - 1)))
    grid = own * len(shared_coefficients(attack, spec)) * together
    if spec.budget is not None and grid > spec.budget:
        raise UserError(
            f"attacker.budget={spec.budget} does not cover the grid of '{attack.name}', which has "
            f"{grid} mixtures; raise it, or give fewer values"
        )
