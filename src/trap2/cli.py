"""The command line, `trap2 COMMAND`: protect, attack and audit, report, publish.

Nothing heavy is imported before a command is known, so that help is instant. Errors of the user's
end in one line on stderr and exit code 2; Ctrl-C ends in exit code 130.
"""

import argparse
import math
import os
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

    _add_attack(commands.add_parser("attack", help="merge a release with others and write it"))

    audit = commands.add_parser("audit", help="attack a release and its control, write a report")
    audit.add_argument("audit", type=Path, help="YAML file")
    audit.add_argument("--out", type=Path, required=True, help="folder for the report")
    audit.add_argument("--suite", metavar="NAME", help="attack as this suite does")
    audit.add_argument("--set", **CHANGES)
    audit.add_argument("--overwrite", action="store_true", help="replace what is there")
    audit.set_defaults(run=_audit)

    _add_publishing(commands)

    listing = commands.add_parser("list", help="list what is built in")
    listing.add_argument("what", choices=["attacks", "losses"], help="which of them")
    listing.add_argument("--suite", metavar="NAME", help="only this suite's attacks")
    listing.set_defaults(run=_list)

    demo = commands.add_parser("demo", help="protect, attack and audit a real encoder on real text")
    demo.add_argument("--out", type=Path, default=Path("build/demo"), help="where everything goes")
    demo.add_argument("--overwrite", action="store_true", help="start again from nothing")
    demo.add_argument("--short", action="store_true", help="few steps and rows: it runs")
    demo.set_defaults(run=_demo)
    return top


def _add_attack(attack: argparse.ArgumentParser) -> None:
    attack.add_argument("name", help="attack, see trap2 list attacks")
    attack.add_argument("--release", type=Path, required=True, help="folder; its head goes along")
    attack.add_argument("--partners", type=Path, nargs="*", default=[], help="folders")
    attack.add_argument("--base", help="local folder or Hub id; by default what the release says")
    chosen = attack.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--coefficient", type=float, help="one for all models")
    chosen.add_argument("--coefficients", type=_numbers, help="one per model, the release first")
    attack.add_argument(
        "--param",
        action="append",
        default=[],
        type=_parameter,
        metavar="k=v",
        help="a parameter of the attack; may be given several times",
    )
    attack.add_argument("--out", type=Path, required=True, help="folder to make")
    attack.add_argument(
        "--as",
        choices=["model", "adapter"],
        default="model",
        dest="form",
        help="a whole model, or a peft adapter where the merge is one; default model",
    )
    attack.add_argument("--overwrite", action="store_true", help="replace what is there")
    attack.set_defaults(run=_attack)


def _add_publishing(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """What comes after an audit: showing it, and letting it travel with the release."""
    report = commands.add_parser(
        "report", help="show a report again, or write it in another format"
    )
    report.add_argument("report", type=Path, help="report.json")
    report.add_argument(
        "--out", type=Path, help=".html, .md, .csv, .svg or .png; default: print it"
    )
    report.add_argument(
        "--figure", default="summary", help="which figure for .svg and .png, default summary"
    )
    report.set_defaults(run=_report)

    compare = commands.add_parser("compare", help="several reports side by side")
    compare.add_argument(
        "reports", type=Path, nargs="+", metavar="reports", help="report.json files"
    )
    compare.add_argument("--out", type=Path, help="page to write, .html")
    compare.set_defaults(run=_compare)

    card = commands.add_parser("card", help="put what an audit found into a release's model card")
    card.add_argument("release", type=Path, help="release folder")
    card.add_argument("report", type=Path, help="report.json of these weights")
    card.set_defaults(run=_card)

    sign = commands.add_parser(
        "sign", help="list the digests of a release, and sign them with a key"
    )
    sign.add_argument("release", type=Path, help="release folder; sign it last")
    sign.add_argument("--key", type=Path, help="EC private key, PEM; without it nothing is signed")
    sign.set_defaults(run=_sign)

    verify = commands.add_parser("verify", help="whether a release is as published and as audited")
    verify.add_argument("release", type=Path, help="release folder")
    verify.add_argument("--key", type=Path, help="the publisher's public key, PEM")
    verify.add_argument("--report", type=Path, help="report.json that should be of these weights")
    verify.set_defaults(run=_verify)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        Exit code: 0, 2 for an error of the user's, 130 after Ctrl-C.
    """
    chosen = parser().parse_args(arguments)
    # Libraries' own progress bars, hints and deprecations would drown ours.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        chosen.run(chosen)
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
    return 0


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        wanted = f"'{text}' is no list of numbers; write for example 0,0.5,1"
        raise argparse.ArgumentTypeError(wanted) from error


def _parameter(text: str) -> tuple[str, float | int | str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        wanted = f"'{text}' is not of the form k=v; write for example density=0.2"
        raise argparse.ArgumentTypeError(wanted)
    for kind in (int, float):
        try:
            return key, kind(value)
        except ValueError:
            continue
    return key, value


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


def _attack(chosen: argparse.Namespace) -> None:
    from trap2.files import refuse_existing

    refuse_existing(chosen.out, chosen.overwrite)
    from trap2.attacks.write import recorded_base, write_merge
    from trap2.tasks.model import base_folder
    from trap2.update import Update

    base = base_folder(chosen.base or recorded_base(chosen.release))
    updates = [Update.open(path, base) for path in (chosen.release, *chosen.partners)]
    out = write_merge(
        chosen.out,
        chosen.name,
        updates,
        chosen.coefficient if chosen.coefficients is None else chosen.coefficients,
        dict(chosen.param),
        form=chosen.form,
        overwrite=chosen.overwrite,
    )
    head = "the release's own head, heads are never merged" if updates[0].head else "no head"
    print(f"merged: {out} ({head})")


def _audit(chosen: argparse.Namespace) -> None:
    from trap2.files import new_folder, refuse_existing
    from trap2.recipes import AuditSpec, load

    suite = [f"attacker.suite={chosen.suite}"] if chosen.suite else []
    spec = load(AuditSpec, chosen.audit, [*suite, *chosen.changes])
    refuse_existing(chosen.out, chosen.overwrite)
    from trap2.auditing.audit import audit
    from trap2.progress import audit_bar
    from trap2.reporting import html, text

    with audit_bar() as progress:
        report = audit(spec, progress)
    with new_folder(chosen.out, chosen.overwrite) as folder:
        report.save(folder / "report.json")
        html.save(report, folder / "report.html")
    print(text.render(report))
    print(f"report: {chosen.out / 'report.html'}")


def _report(chosen: argparse.Namespace) -> None:
    from trap2.reporting import export, text
    from trap2.schema import Report

    report = Report.load(chosen.report)
    if chosen.out is None:
        print(text.render(report))
        return
    export.export(report, chosen.out, chosen.figure)
    print(f"written: {chosen.out}")


def _compare(chosen: argparse.Namespace) -> None:
    from trap2.reporting import comparison, text
    from trap2.schema import Report

    shared = os.path.commonpath([path.absolute().parent for path in chosen.reports])
    reports = [(os.path.relpath(path, shared), Report.load(path)) for path in chosen.reports]
    if chosen.out is not None:
        from trap2.reporting import html

        html.save_comparison(reports, chosen.out)
    print(text.aligned(comparison.leaderboard(reports), width=120))


def _card(chosen: argparse.Namespace) -> None:
    from trap2.reporting.model_card import embed
    from trap2.schema import Report

    embed(Report.load(chosen.report), chosen.release)
    print(f"card: {chosen.release / 'README.md'}")


def _sign(chosen: argparse.Namespace) -> None:
    from trap2 import signing

    count = signing.write_manifest(chosen.release)
    print(f"{count} files listed in {chosen.release / signing.MANIFEST}")
    if chosen.key is not None:
        signing.sign(chosen.release, chosen.key)
        print(f"signed: {chosen.release / signing.SIGNATURE}")


def _verify(chosen: argparse.Namespace) -> None:
    from trap2 import signing

    if chosen.key is None or (chosen.release / signing.MANIFEST).exists():
        count = signing.check_manifest(chosen.release)
        print(f"{count} files are as {signing.MANIFEST} lists them")
    if chosen.key is not None:
        signing.check_signature(chosen.release, chosen.key)
        print(f"every file is as the owner of {chosen.key} signed it")
    else:
        print("no key was given, so this does not say who made them")
    if chosen.report is not None:
        from trap2.schema import Report

        Report.load(chosen.report).check_weights(chosen.release)
        print(f"{chosen.report} is of these weights")


def _list(chosen: argparse.Namespace) -> None:
    if chosen.what == "attacks":
        _list_attacks(chosen.suite)
        return
    if chosen.suite:
        raise UserError("--suite is about attacks; write: trap2 list attacks --suite NAME")
    from trap2.protecting.losses import TRAP_LOSSES

    for name in TRAP_LOSSES:
        print(f"{name:14} {(TRAP_LOSSES.get(name).__doc__ or '').splitlines()[0]}")


def _list_attacks(name: str | None) -> None:
    from trap2.attacks.attack import load_attacks
    from trap2.suites import suite

    attacks = load_attacks()
    rows: list[tuple[str, Any, Any, bool]] = [
        (own, attacks.get(own).coefficients, attacks.get(own).grid, True) for own in attacks
    ]
    if name:
        rows = [(t.attack, t.coefficients, dict(t.grid), t.per_model) for t in suite(name).trials]
    print(f"{'name':16} {'tiers':9} {'needs':6} {'merges':>6}  paper and grid")
    for own, coefficients, grid, per_model in rows:
        entry = attacks.get(own)
        tiers = " ".join(tier for tier in entry.tiers if per_model or tier != "T3")
        merges = len(coefficients) * math.prod(map(len, grid.values()))
        values = ", ".join(f"{key} in {tuple(values)}" for key, values in grid.items())
        needs = ", ".join(entry.needs) or "-"
        line = f"{own:16} {tiers:9} {needs:6} {merges:6}  {entry.paper}  {values}"
        print(line.rstrip())


def _demo(chosen: argparse.Namespace) -> None:
    try:
        from trap2.demo.run import demo
    except ModuleNotFoundError as error:
        raise UserError(
            f"the demo needs '{error.name}', which is not installed; pip install 'trap2[demo]'"
        ) from error
    demo(chosen.out, short=chosen.short, overwrite=chosen.overwrite)
