"""Commands that judge: `attack`, `audit`, `combine`, and `list` of what is built in."""

import argparse
import math
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trap2.cli.arguments import CHANGES, count, numbers, parameter, required
from trap2.errors import UserError
from trap2.registry import Registry

if TYPE_CHECKING:
    from trap2.auditing.arena import Crew
    from trap2.recipes import AuditSpec


def add_judging(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """What tries a release."""
    _add_attack(commands.add_parser("attack", help="merge a release with others and write it"))

    audit = commands.add_parser("audit", help="attack a release and its control, write a report")
    audit.add_argument("audit", type=Path, help="YAML file")
    audit.add_argument("--out", type=Path, required=True, help="folder for the report")
    audit.add_argument("--suite", metavar="NAME", help="attack as this suite does")
    audit.add_argument("--set", **CHANGES)
    audit.add_argument("--overwrite", action="store_true", help="replace the report that is there")
    audit.add_argument(
        "--ledger", type=Path, help="folder of recorded evaluations, may be shared; default OUT"
    )
    audit.add_argument(
        "--workers", type=count, default=1, metavar="N", help="processes that evaluate; default 1"
    )
    audit.add_argument(
        "--backend", choices=["loky", "ray"], default="loky", help="of the workers; default loky"
    )
    audit.add_argument("--ray-address", metavar="HOST:PORT", help="cluster; default this machine")
    audit.add_argument(
        "--require",
        type=required,
        default={},
        metavar="T1=0.9,T2=0.6",
        help="exit with 1 if the interval of a tier's unmergeability begins below",
    )
    audit.set_defaults(run=_audit)

    _add_combine(commands.add_parser("combine", help="one record of audits under different seeds"))


def add_list(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """What there is to choose from."""
    listing = commands.add_parser("list", help="list what is built in")
    listing.add_argument("what", choices=["attacks", "losses", "undos"], help="which of them")
    listing.add_argument("--suite", metavar="NAME", help="only this suite's attacks")
    listing.set_defaults(run=_list)


def _add_attack(attack: argparse.ArgumentParser) -> None:
    attack.add_argument("name", help="attack, see trap2 list attacks")
    attack.add_argument("--release", type=Path, required=True, help="folder; its head goes along")
    attack.add_argument("--partners", type=Path, nargs="*", default=[], help="folders")
    attack.add_argument("--base", help="local folder or Hub id; by default what the release says")
    chosen = attack.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--coefficient", type=float, help="one for all models")
    chosen.add_argument("--coefficients", type=numbers, help="one per model, the release first")
    attack.add_argument(
        "--param",
        action="append",
        default=[],
        type=parameter,
        metavar="k=v",
        help="a parameter of the attack; may be given several times",
    )
    attack.add_argument(
        "--undo", metavar="NAME", help="bring every release into the base's basis first"
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


def _add_combine(combine: argparse.ArgumentParser) -> None:
    combine.add_argument(
        "reports", type=Path, nargs="+", metavar="reports", help="report.json files, one a seed"
    )
    combine.add_argument("--out", type=Path, required=True, help="folder for combined.json")
    combine.add_argument("--overwrite", action="store_true", help="replace what is there")
    combine.set_defaults(run=_combine)


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
        undo=chosen.undo,
        form=chosen.form,
        overwrite=chosen.overwrite,
    )
    head = "the release's own head, heads are never merged" if updates[0].head else "no head"
    print(f"merged: {out} ({head})")


def _audit(chosen: argparse.Namespace) -> int:
    from trap2.files import UNFINISHED, held, refuse_existing
    from trap2.recipes import AuditSpec, load

    suite = [f"attacker.suite={chosen.suite}"] if chosen.suite else []
    spec = load(AuditSpec, chosen.audit, [*suite, *chosen.changes])
    with held(chosen.out):
        refuse_existing(chosen.out, chosen.overwrite, besides=UNFINISHED)
        from trap2.auditing.audit import audit
        from trap2.auditing.ledger import Ledger
        from trap2.auditing.verdict import unmet
        from trap2.progress import audit_bar
        from trap2.reporting import html, text

        with (
            audit_bar() as progress,
            Ledger(chosen.ledger or chosen.out) as ledger,
            _workers(chosen, spec) as workers,
        ):
            report = audit(spec, progress, ledger, workers)
        html.save(report, chosen.out / "report.html")
        report.save(chosen.out / "report.json")  # last: with it the audit is finished
    print(text.render(report))
    print(f"report: {chosen.out / 'report.html'}")
    reasons = unmet(report, chosen.require)
    for reason in reasons:
        print(f"trap2: not met: {reason}", file=sys.stderr)
    return 1 if reasons else 0


def _workers(
    chosen: argparse.Namespace, spec: "AuditSpec"
) -> AbstractContextManager["Crew | None"]:
    """Who evaluates beside this process: nobody, unless there are several workers."""
    if chosen.workers == 1:
        if chosen.backend == "ray":
            raise UserError("--backend ray with one worker gains nothing; add --workers N")
        return nullcontext()
    if chosen.ray_address and chosen.backend != "ray":
        raise UserError(f"--ray-address {chosen.ray_address} needs --backend ray; add it")
    from trap2.auditing.workers import Workers

    return Workers(spec, chosen.workers, chosen.backend, chosen.ray_address)


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
        _list_attacks(chosen.suite)
        return
    if chosen.suite:
        raise UserError("--suite is about attacks; write: trap2 list attacks --suite NAME")
    from trap2.attacks.undo import UNDOS
    from trap2.protecting.losses import TRAP_LOSSES

    known: Registry[Any] = UNDOS if chosen.what == "undos" else TRAP_LOSSES
    for name in known:
        print(f"{name:14} {(known.get(name).__doc__ or '').splitlines()[0]}")


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
    trained = suite(name).settings() if name else {}
    for method in trained.get("recovery", ()):
        merges = len(trained["recovery_coefficients"])
        budget = f"rows in {tuple(trained['recovery_rows'])}, "
        budget += f"steps in {tuple(trained['recovery_steps'])}"
        print(f"{method:16} {'T5':9} {'labels':6} {merges:6}  {budget}")
