"""The command line: `trap2 protect | sweep | audit | combine | list | demo`.

Nothing heavy is imported before a command is known, so that help is instant. Errors of the user's
end in one line on stderr and exit code 2; a requirement that is not met in 1; Ctrl-C in 130.
"""

import argparse
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trap2 import __version__
from trap2.errors import Trap2Error, UserError

SCALES = "0,.2,.4,.6,.8,1,1.2,1.5,2"
CHANGES: dict[str, Any] = {
    "action": "append",
    "default": [],
    "metavar": "a.b=c",
    "dest": "changes",
    "help": "change a setting of the file; may be given several times",
}


def parser() -> argparse.ArgumentParser:
    """The whole surface of the command line."""
    top = argparse.ArgumentParser(
        prog="trap2",
        description="Make fine-tuned weights unmergeable, attack the protection, report what held.",
    )
    top.add_argument("--version", action="version", version=f"trap2 {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    protect = commands.add_parser("protect", help="fine-tune by a recipe and write a release")
    protect.add_argument("recipe", type=Path, help="YAML file")
    protect.add_argument("--out", type=Path, required=True, help="release folder to make")
    protect.add_argument("--set", **CHANGES)
    protect.add_argument("--overwrite", action="store_true", help="replace what is there")
    protect.add_argument("--resume", action="store_true", help="continue an interrupted run")
    protect.set_defaults(run=_protect)

    sweep = commands.add_parser("sweep", help="accuracy and loss of a release against its scale")
    sweep.add_argument("release", type=Path, help="release folder")
    sweep.add_argument("--recipe", type=Path, required=True, help="YAML with its base and task")
    sweep.add_argument("--scales", type=_numbers, default=SCALES, help=f"default {SCALES}")
    sweep.add_argument(
        "--split", choices=["validation", "test"], default="test", help="default test"
    )
    sweep.add_argument("--rows", type=int, default=500, help="how many at most, default 500")
    sweep.set_defaults(run=_sweep)

    audit = commands.add_parser("audit", help="attack a release and its control, write a report")
    audit.add_argument("audit", type=Path, help="YAML file")
    audit.add_argument("--out", type=Path, required=True, help="folder for the report")
    audit.add_argument("--set", **CHANGES)
    audit.add_argument("--overwrite", action="store_true", help="replace the report that is there")
    audit.add_argument(
        "--ledger", type=Path, help="folder of recorded evaluations, may be shared; default OUT"
    )
    audit.add_argument(
        "--require",
        type=_required,
        default={},
        metavar="T1=0.9,T2=0.6",
        help="exit with 1 if the interval of a tier's unmergeability begins below",
    )
    audit.set_defaults(run=_audit)

    _add_combine(commands.add_parser("combine", help="one record of audits under different seeds"))

    listing = commands.add_parser("list", help="list what is built in")
    listing.add_argument("what", choices=["attacks", "losses"], help="which of them")
    listing.set_defaults(run=_list)

    demo = commands.add_parser("demo", help="protect, attack and audit a real encoder on real text")
    demo.add_argument("--out", type=Path, default=Path("build/demo"), help="where everything goes")
    demo.add_argument("--overwrite", action="store_true", help="start again from nothing")
    demo.add_argument("--short", action="store_true", help="few steps and rows: it runs")
    demo.set_defaults(run=_demo)
    return top


def _add_combine(combine: argparse.ArgumentParser) -> None:
    combine.add_argument(
        "reports", type=Path, nargs="+", metavar="reports", help="report.json files, one a seed"
    )
    combine.add_argument("--out", type=Path, required=True, help="folder for combined.json")
    combine.add_argument("--overwrite", action="store_true", help="replace what is there")
    combine.set_defaults(run=_combine)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        Exit code: 0, 1 if a requirement is not met, 2 for an error of the user's, 130 after Ctrl-C.
    """
    chosen = parser().parse_args(arguments)
    # Libraries' own progress bars, hints and deprecations would drown ours.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        return int(chosen.run(chosen) or 0)
    except Trap2Error as error:
        print(f"trap2: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        missing = f"'{error.name}', which is not installed; pip install 'trap2[run]'"
        print(f"trap2: error: {chosen.command} needs {missing}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("trap2: interrupted; what was finished is kept", file=sys.stderr)
        return 130


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        wanted = f"'{text}' is no list of numbers; write for example 0,0.5,1"
        raise argparse.ArgumentTypeError(wanted) from error


def _required(text: str) -> dict[str, float]:
    found = [re.fullmatch(r"(T[1-3])=(0?\.\d+|[01](?:\.0*)?)", part) for part in text.split(",")]
    if None in found:
        wanted = f"'{text}' names no tiers with a share each; write for example T1=0.9,T2=0.6"
        raise argparse.ArgumentTypeError(wanted)
    return {match[1]: float(match[2]) for match in found if match}


def _protect(chosen: argparse.Namespace) -> None:
    from trap2.recipes import Recipe, load

    recipe = load(Recipe, chosen.recipe, chosen.changes)
    from trap2.protecting.run import protect

    out = protect(recipe, chosen.out, overwrite=chosen.overwrite, resume=chosen.resume)
    print(f"release: {out}")


def _sweep(chosen: argparse.Namespace) -> None:
    from trap2.recipes import Recipe, load

    recipe = load(Recipe, chosen.recipe)
    from trap2.auditing.sweep import sweep

    print(f"{'s':>6} {'accuracy':>9} {'loss':>8}")
    sweep(
        chosen.release,
        recipe.base,
        recipe.task,
        chosen.scales,
        split=chosen.split,
        rows=chosen.rows,
        seed=recipe.seed,
        say=lambda p: print(f"{p.s:6g} {100 * p.accuracy:8.1f}% {p.loss:8.3f}", flush=True),
    )


def _audit(chosen: argparse.Namespace) -> int:
    from trap2.files import UNFINISHED, held, refuse_existing
    from trap2.recipes import AuditSpec, load

    spec = load(AuditSpec, chosen.audit, chosen.changes)
    with held(chosen.out):
        refuse_existing(chosen.out, chosen.overwrite, besides=UNFINISHED)
        from trap2.auditing.audit import audit
        from trap2.auditing.ledger import Ledger
        from trap2.auditing.verdict import unmet
        from trap2.progress import audit_bar
        from trap2.reporting import html, text

        with audit_bar() as progress, Ledger(chosen.ledger or chosen.out) as ledger:
            report = audit(spec, progress, ledger)
        html.save(report, chosen.out / "report.html")
        report.save(chosen.out / "report.json")  # last: with it the audit is finished
    print(text.render(report))
    print(f"report: {chosen.out / 'report.html'}")
    reasons = unmet(report, chosen.require)
    for reason in reasons:
        print(f"trap2: not met: {reason}", file=sys.stderr)
    return 1 if reasons else 0


def _combine(chosen: argparse.Namespace) -> None:
    from trap2.files import new_folder, refuse_existing
    from trap2.schema import Report

    refuse_existing(chosen.out, chosen.overwrite)
    from trap2.auditing.combine import combine
    from trap2.reporting import combined as page

    combined = combine([(str(path), Report.load(path)) for path in chosen.reports])
    with new_folder(chosen.out, chosen.overwrite) as folder:
        combined.save(folder / "combined.json")
    print(page.render(combined))
    print(f"record: {chosen.out / 'combined.json'}")


def _list(chosen: argparse.Namespace) -> None:
    if chosen.what == "attacks":
        from trap2.attacks.attack import load_attacks

        attacks = load_attacks()
        for entry in (attacks.get(name) for name in attacks):
            grid = ", ".join(f"{key} in {values}" for key, values in entry.grid.items())
            print(f"{entry.name:16} {' '.join(entry.tiers):9} {entry.paper}  {grid}".rstrip())
        return
    from trap2.protecting.losses import TRAP_LOSSES

    for name in TRAP_LOSSES:
        print(f"{name:14} {(TRAP_LOSSES.get(name).__doc__ or '').splitlines()[0]}")


def _demo(chosen: argparse.Namespace) -> None:
    try:
        from trap2.demo.run import demo
    except ModuleNotFoundError as error:
        raise UserError(
            f"the demo needs '{error.name}', which is not installed; pip install 'trap2[demo]'"
        ) from error
    demo(chosen.out, short=chosen.short, overwrite=chosen.overwrite)
