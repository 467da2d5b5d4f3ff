"""Commands that make: a release, the bank of `surrogates` it is trained with, the `demo`."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from trap2.cli.arguments import CHANGES, numbers
from trap2.errors import UserError

if TYPE_CHECKING:
    from trap2.schema import ScalePoint

SCALES = "0,.2,.4,.6,.8,1,1.2,1.5,2"


def add_making(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """What leads to a release."""
    protect = commands.add_parser("protect", help="fine-tune by a recipe and write a release")
    protect.add_argument("recipe", type=Path, help="YAML file")
    protect.add_argument("--out", type=Path, required=True, help="release folder to make")
    protect.add_argument("--set", **CHANGES)
    protect.add_argument("--overwrite", action="store_true", help="replace what is there")
    protect.add_argument("--resume", action="store_true", help="continue an interrupted run")
    protect.set_defaults(run=_protect)

    bank = commands.add_parser("surrogates", help="make a bank of partners to train the trap with")
    bank.add_argument("recipe", type=Path, help="YAML file: base, and texts or tasks")
    bank.add_argument("--out", type=Path, required=True, help="bank's folder to make")
    bank.add_argument("--set", **CHANGES)
    bank.add_argument("--overwrite", action="store_true", help="replace what is there")
    bank.set_defaults(run=_surrogates)

    sweep = commands.add_parser("sweep", help="accuracy and loss of a release against its scale")
    sweep.add_argument("release", type=Path, help="release folder")
    sweep.add_argument("--recipe", type=Path, required=True, help="YAML with its base and task")
    sweep.add_argument("--scales", type=numbers, default=SCALES, help=f"default {SCALES}")
    sweep.add_argument(
        "--split", choices=["validation", "test"], default="test", help="default test"
    )
    sweep.add_argument("--rows", type=int, default=500, help="how many at most, default 500")
    sweep.set_defaults(run=_sweep)


def add_demo(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """All of it at once."""
    demo = commands.add_parser("demo", help="protect, attack and audit a real encoder on real text")
    demo.add_argument("--out", type=Path, default=Path("build/demo"), help="where everything goes")
    demo.add_argument("--overwrite", action="store_true", help="start again from nothing")
    demo.add_argument("--short", action="store_true", help="few steps and rows: it runs")
    demo.set_defaults(run=_demo)


def _protect(chosen: argparse.Namespace) -> None:
    from trap2.recipes import Recipe, load

    recipe = load(Recipe, chosen.recipe, chosen.changes)
    from trap2.files import read_json
    from trap2.protecting.run import protect
    from trap2.protecting.selection import open_trap

    out = protect(recipe, chosen.out, overwrite=chosen.overwrite, resume=chosen.resume)
    if doubt := open_trap(read_json(out / "trap2.json")["validation"]["chosen"]):
        print(f"trap2: warning: {doubt}", file=sys.stderr)
    print(f"release: {out}")


def _surrogates(chosen: argparse.Namespace) -> None:
    from trap2.recipes import BankRecipe, load

    recipe = load(BankRecipe, chosen.recipe, chosen.changes)
    from trap2.protecting.bank import build_bank

    print(f"bank: {build_bank(recipe, chosen.out, overwrite=chosen.overwrite)}")


def _sweep(chosen: argparse.Namespace) -> None:
    from trap2.recipes import Recipe, load

    recipe = load(Recipe, chosen.recipe)
    from trap2.auditing.sweep import sweep

    lines = [f"{'s':>6} {'accuracy':>9} {'loss':>8}"]

    def say(point: "ScalePoint") -> None:
        """Print a point; the head comes with the first, for until then inputs may be refused."""
        lines.append(f"{point.s:6g} {100 * point.accuracy:8.1f}% {point.loss:8.3f}")
        print("\n".join(lines), flush=True)
        lines.clear()

    sweep(
        chosen.release,
        recipe.base,
        recipe.task,
        chosen.scales,
        split=chosen.split,
        rows=chosen.rows,
        seed=recipe.seed,
        say=say,
    )


def _demo(chosen: argparse.Namespace) -> None:
    try:
        from trap2.demo.run import demo
    except ModuleNotFoundError as error:
        raise UserError(
            f"the demo needs '{error.name}', which is not installed; pip install 'trap2[demo]'"
        ) from error
    demo(chosen.out, short=chosen.short, overwrite=chosen.overwrite)
