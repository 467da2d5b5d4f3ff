"""What the checks weigh beside the scores: how both sides were made, and what was tried."""

import copy
import json
import math
from pathlib import Path
from typing import Any

from trap2.auditing.arena import Arena
from trap2.auditing.grid import tried
from trap2.errors import Trap2Error
from trap2.files import read_json
from trap2.schema import Evidence
from trap2.statistics import normalising
from trap2.tasks.model import load_release


def gather(arena: Arena) -> Evidence:
    """Everything of an audit that only its checks need."""
    arena.progress.say("loading the release as its users do")
    spec = arena.spec
    record = release_record(spec.release.path)
    control = release_record(spec.control) if spec.control else {}
    surrogates = record.get("surrogates")
    return Evidence(
        grids={
            name: tried(name, spec.attacker)
            for name in (*spec.attacker.attacks, *spec.attacker.data_attacks)
        },
        control_differs=differences(record, control),
        surrogates=[str(name) for name in surrogates] if isinstance(surrogates, list) else [],
        batch_norm_layers=len(normalising(arena.encoder)),
        reload_gap={side: _reload_gap(arena, side) for side in arena.sides},
    )


def release_record(folder: Path) -> dict[str, Any]:
    """What a release says of itself in `trap2.json`; empty where there is none."""
    path = folder / "trap2.json"
    return read_json(path) if path.is_file() else {}


def recipe_of(record: dict[str, Any]) -> dict[str, str]:
    """The recipe in a `trap2.json`, as JSON by dotted key; empty where there is none."""
    recipe = record.get("recipe")
    known = _flat(recipe) if isinstance(recipe, dict) else {}
    return {key: json.dumps(value, ensure_ascii=False) for key, value in known.items()}


def differences(release: dict[str, Any], control: dict[str, Any]) -> list[str] | None:
    """Keys in which two releases were trained differently; None if one does not say how it was.

    Args:
        release: The `trap2.json` of the release.
        control: The `trap2.json` of its control.
    """
    ours, theirs, trap = release.get("recipe"), control.get("recipe"), control.get("trap2")
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        return None
    # At strength 0 no other setting of the trap has an effect.
    plain = isinstance(trap, dict) and trap.get("strength") == 0
    found = [] if plain else ["trap2.strength"]
    ours, theirs = (_flat({**recipe, "trap2": None}) for recipe in (ours, theirs))
    return found + [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    if not isinstance(value, dict):
        return {key: value}
    return {
        place: leaf
        for name, inner in value.items()
        for place, leaf in _flat(inner, f"{key}.{name}" if key else name).items()
    }


def _reload_gap(arena: Arena, side: str) -> float | None:
    """See `Evidence.reload_gap`; on test rows, where the merge path has been run anyway."""
    member = arena.members[side]
    evaluator = copy.copy(member.evaluators["test"])
    try:
        evaluator.model = load_release(member.update, member.task)
    except Trap2Error:
        return None  # the check says so
    own = evaluator().compared
    gap = (own - arena.evaluate(arena.alone(side), side, "test").compared).abs().max()
    share = float(gap / own.abs().max().clamp(min=1e-9))
    return share if math.isfinite(share) else None
