"""What an attacker shall try, refused where it cannot be done, before anything slow is."""

from trap2.attacks.attack import ROUTING, load_attacks
from trap2.auditing.grid import check_budget, own_coefficients, settings, shared_coefficients
from trap2.errors import UserError
from trap2.recipes import AttackerSpec


def check_plan(spec: AttackerSpec, models: int) -> None:
    """Refuse what no attack can do, before anything slow is done.

    Args:
        spec: What the attacker shall try.
        models: How many models there are to merge.

    Raises:
        UserError: No attack, an unknown one or an unknown parameter, one that cannot merge so many
            models, one for which no coefficient is left, or one whose grid exceeds the budget.
    """
    attacks = load_attacks()
    if not (spec.attacks or spec.t3_attacks or spec.data_attacks or spec.recovery or spec.routing):
        raise UserError(
            "attacker.attacks, t3_attacks, data_attacks, recovery and routing are all empty, so "
            f"nothing would be tried; known: {', '.join(attacks)}"
        )
    for name, grid in spec.grids.items():
        settings(attacks.get(name), grid)
    for name in spec.coefficients if isinstance(spec.coefficients, dict) else ():
        attacks.get(name)  # a name without an attack would be ignored
    _check_lists(spec)
    for attack in map(attacks.get, [*spec.attacks, *spec.t3_attacks, *spec.data_attacks]):
        if attack.models[0] > models:
            raise UserError(
                f"attack '{attack.name}' merges {attack.models[0]} models or more, here are "
                f"{models}; give more partners, or remove it from the attacks"
            )
        if not shared_coefficients(attack, spec):
            raise UserError(
                f"attack '{attack.name}' takes coefficients from 0 to 1, and "
                f"attacker.coefficients has none; add some, or remove it from the attacks"
            )
        if not any(own_coefficients(attack, spec)):
            raise UserError(
                f"attack '{attack.name}' leaves the release out at every coefficient given; "
                "add others to attacker.coefficients, or remove it from the attacks"
            )
        check_budget(attack, spec, models)
    for attack in map(attacks.get, spec.t3_attacks):
        if "T3" not in attack.tiers or (attack.models[1] or models) < models:
            raise UserError(
                f"attack '{attack.name}' cannot merge {models} models with one coefficient each, "
                "which T3 does; remove it from attacker.t3_attacks"
            )


def _check_lists(spec: AttackerSpec) -> None:
    """Whether every attack stands where what it needs is counted."""
    for key in ("attacks", "t3_attacks", "data_attacks"):
        for attack in map(load_attacks().get, getattr(spec, key)):
            if attack.needs_data is not (key == "data_attacks"):
                takes = "takes" if attack.needs_data else "takes no"
                right = "data_attacks" if attack.needs_data else "attacks"
                raise UserError(
                    f"attacker.{key} has '{attack.name}', which {takes} unlabelled rows; "
                    f"move it to attacker.{right}"
                )
    for key in ("attacks", "t3_attacks", "data_attacks", "routing"):
        for attack in map(load_attacks().get, getattr(spec, key)):
            if (ROUTING in attack.tiers) is not (key == "routing"):
                does, right = ("merges", "attacks") if key == "routing" else ("routes", "routing")
                raise UserError(
                    f"attacker.{key} has '{attack.name}', which {does} models; "
                    f"move it to attacker.{right}"
                )
