"""A shelf of pico releases, made once a run by the real recipes: never write into it."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pico

ATTACKER: dict[str, Any] = {
    "attacks": ["task_arithmetic", "slerp"],
    "coefficients": [0.0, 0.5, 1.0],
    "t3_values": [0.4, 1.0],
    "relabel_rows": [6, 20],
    "validation_rows": 24,
    "test_rows": 24,
}


@dataclass(frozen=True)
class Shelf:
    """What is on the shelf: a base, and for each kind a release, its control and a partner."""

    root: Path
    base: Path

    def task(self, name: str, described: bool) -> dict[str, Any]:
        """The section of a task that has been on the shelf all along."""
        files = {s: str(self.root / "data" / name / f"{s}.csv") for s in ("train", *SPLITS)}
        return pico.task(name, files, described)

    def release(self, kind: str, role: str) -> Path:
        """Folder of the `release`, `control` or `partner` of a kind: `lora` or `full`."""
        return self.root / kind / role

    def audit(self, kind: str, **attacker: Any) -> dict[str, Any]:
        """The settings of an audit; LoRA releases have description heads, full ones classifiers."""
        described = kind == "lora"
        return {
            "base": str(self.base),
            "release": {
                "path": str(self.release(kind, "release")),
                "task": self.task("a", described),
            },
            "control": str(self.release(kind, "control")),
            "partners": [
                {
                    "path": str(self.release(kind, "partner")),
                    "task": self.task("b", described),
                }
            ],
            "attacker": {**ATTACKER, **attacker},
            "scales": [0.0, 0.5, 1.0, 1.5],
            "seed": 3,
        }


SPLITS = ("validation", "test")


@cache
def stock(base: Path) -> Shelf:
    """Make the releases of a base, in a folder beside it, once."""
    from trap2.protecting.run import protect
    from trap2.recipes import Recipe

    shelf = Shelf(base.parent / "shelf", base)
    for seed, name in enumerate("ab"):
        pico.write_task(shelf.root / "data" / name, seed=seed)
    for kind in ("lora", "full"):
        for role, task, strength in (
            ("release", "a", 0.5),
            ("control", "a", 0.0),
            ("partner", "b", 0.0),
        ):
            recipe = pico.recipe(
                base, shelf.task(task, kind == "lora"), kind, steps=20, strength=strength
            )
            recipe["training"]["learning_rate"] = 0.03 if kind == "lora" else 0.01
            recipe["training"]["evaluate_every"] = 20
            protect(Recipe.model_validate(recipe), shelf.release(kind, role), quiet=True)
    return shelf
