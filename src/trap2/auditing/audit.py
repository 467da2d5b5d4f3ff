"""`trap2 audit`: references, scale curves, the tuned attacker on both sides, verdict, record."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from trap2.attacks.attack import load_attacks
from trap2.auditing.arena import CONTROL, RELEASE, WHOLE, Arena, Crew, Mixture, Split
from trap2.auditing.attacker import Attacker, Catch
from trap2.auditing.bootstrap import Bootstrap, Key, Retained, interval, spreads
from trap2.auditing.checks import raised
from trap2.auditing.evidence import gather, recipe_of, release_record
from trap2.auditing.ledger import Ledger
from trap2.auditing.plan import check_plan
from trap2.auditing.recovery import as_attacks, check_budget, recovery
from trap2.auditing.routing import routed, routes
from trap2.auditing.sweep import scale_point
from trap2.auditing.verdict import limits, retained_skill, sentence, tier_results
from trap2.errors import UserError
from trap2.progress import SILENT, Progress
from trap2.provenance import machine, now, versions
from trap2.recipes import AuditSpec
from trap2.schema import (
    AttackResult,
    FrontierPoint,
    PartnerScore,
    References,
    RelabelledReferences,
    ReleaseInfo,
    Report,
    ScalePoint,
)
from trap2.tasks.relabel import relabelled_accuracy
from trap2.taskspec import CLASSIFIED


def audit(
    spec: AuditSpec,
    progress: Progress = SILENT,
    ledger: Ledger | None = None,
    crew: Crew | None = None,
) -> Report:
    """Audit one release.

    Args:
        spec: The release, its base, control and partners, and what the attacker may spend.
        progress: Told what is being done.
        ledger: Where evaluations are recorded, and taken from if they are there: a killed audit
            goes on, with the same record in the end but for the times.
        crew: `Workers` who evaluate beside this process, with the same record in the end.

    Returns:
        The record; nothing but the ledger is written.

    Raises:
        UserError: An input is not acceptable.
    """
    started = time.monotonic()
    check_plan(spec.attacker, 1 + len(spec.partners))
    _check_kinds(spec)
    progress.say("reading releases and rows")
    arena = Arena(spec, progress, ledger, crew)
    spec = arena.spec
    _check_rows(arena)
    _check_tools(arena)
    attackers = {side: Attacker(arena, side) for side in arena.sides}
    _prepare(arena, attackers)
    progress.say("references and scale curves")
    references = _references(arena)
    evidence = gather(arena)
    curves = {side: _curve(arena, side) for side in arena.sides}
    catches = {side: _attack(attacker) for side, attacker in attackers.items()}
    bootstrap = Bootstrap(arena)
    retained = {side: bootstrap.retained(side, found) for side, found in catches.items()}
    attacks = [_result(key, catches, references, retained) for key in catches[RELEASE]]
    trained, kept = recovery(attackers, bootstrap)
    attacks += as_attacks(trained)
    apart = routed(arena)
    spread = spreads({side: {**retained[side], **kept[side]} for side in arena.sides})
    tiers = tier_results(attacks, references, spec.verdict, spread)
    cost = None if references.control is None else references.control - references.standalone
    release = arena.members[RELEASE]
    unread = "" if release.evaluators["test"].reading.classes else spec.release.task.kind
    report = Report(
        release=_release_info(arena),
        references=references,
        utility_cost=cost,
        utility_cost_interval=bootstrap.utility_cost(),
        scale_curve=curves[RELEASE],
        control_scale_curve=curves.get(CONTROL, []),
        attacks=attacks,
        frontier=_frontier(attackers),
        recovery=trained,
        routing=apart,
        tiers=tiers,
        partners_keep=spec.attacker.partners_keep,
        thresholds=spec.verdict,
        evidence=evidence,
        verdict=sentence(references, cost, tiers, spec.verdict),
        limits=limits(spec.attacker.recovery, unread),
        settings=spec.attacker.model_dump(mode="json"),
        versions=versions(),
        machine=machine(),
        seed=spec.seed,
        digests={"base": arena.base.digest}
        | {name: member.update.digest for name, member in arena.members.items()},
        rows=_rows(arena),
        created=now(),
        seconds=round(time.monotonic() - started, 1),
    )
    return report.model_copy(update={"flags": raised(report)})


def _rows(arena: Arena) -> dict[str, int]:
    """Rows of the protected task, those that T4 looked at without labels, and model runs."""
    found: dict[str, int] = {s: len(arena.members[RELEASE].evaluators[s]) for s in WHOLE}
    found["evaluations"] = arena.evaluations
    if arena.spec.attacker.data_attacks:
        found["unlabelled"] = max(arena.unlabelled(name).rows for name in arena.members)
    return found


def _check_kinds(spec: AuditSpec) -> None:
    """Attackers who run rows themselves know heads of classes only."""
    tried = spec.attacker
    for task in (spec.release.task, *(partner.task for partner in spec.partners)):
        if (tried.data_attacks or tried.recovery) and task.kind not in CLASSIFIED:
            raise UserError(
                f"task '{task.name}' is of kind {task.kind}, and tiers T4 and T5 work on the "
                "outputs of a head of classes; remove attacker.data_attacks and attacker.recovery"
            )


def _check_rows(arena: Arena) -> None:
    """Labelled rows enough for every re-labelling, before anything slow is done."""
    wanted = max(arena.spec.attacker.relabel_rows, default=0)
    found = len(arena.members[RELEASE].evaluators["validation"])
    if found < wanted:
        raise UserError(
            f"re-labelling with {wanted} rows needs as many validation rows, there are {found}; "
            "raise validation_rows, give more rows, or lower relabel_rows"
        )
    check_budget(arena.spec.attacker, found)


def _check_tools(arena: Arena) -> None:
    """Libraries that are there and can merge these releases, before anything slow is done."""
    tried = arena.spec.attacker
    vectors = [member.vector for member in arena.members.values()]
    for name in dict.fromkeys((*tried.attacks, *tried.t3_attacks, *tried.data_attacks)):
        tool = load_attacks().get(name).tool
        if tool is not None:
            tool.check(vectors)


def _prepare(arena: Arena, attackers: Mapping[str, Attacker]) -> None:
    """Say how much will be asked for whatever comes; have the crew, if there is one, make it."""
    grids = (attacker.certain() for attacker in attackers.values())
    wanted = dict.fromkeys(chain(_certain(arena), routes(arena), *grids))
    arena.progress.expect(len(wanted))
    if arena.crew is not None:
        arena.progress.say(f"references and grids, {arena.crew.count} mixtures at a time")
        arena.prepare(wanted)


def _certain(arena: Arena) -> Iterator[tuple[Mixture, str, Split]]:
    """The evaluations that references and scale curves need."""
    for side in arena.sides:
        yield from ((arena.alone(side, s), side, "validation") for s in (0.0, 1.0))
        yield from ((arena.alone(side, s), side, "test") for s in (0.0, 1.0, *arena.spec.scales))
    yield from ((arena.alone(p, s), p, "test") for p in arena.partners for s in (0.0, 1.0))


def _references(arena: Arena) -> References:
    def accuracy(member: str, s: float) -> float:
        return arena.evaluate(arena.alone(member, s), member, "test").accuracy

    def relabelled(member: str, s: float, rows: int) -> float:
        mixture = arena.alone(member, s)
        return relabelled_accuracy(
            arena.evaluate(mixture, member, "validation"),
            arena.evaluate(mixture, member, "test"),
            rows,
        )

    def chance(member: str) -> float:
        return arena.members[member].evaluators["test"].reading.chance

    has_control = CONTROL in arena.sides
    return References(
        base=accuracy(RELEASE, 0.0),
        standalone=accuracy(RELEASE, 1.0),
        control=accuracy(CONTROL, 1.0) if has_control else None,
        control_base=accuracy(CONTROL, 0.0) if has_control else None,
        chance=chance(RELEASE),
        relabelled=[
            RelabelledReferences(
                rows=rows,
                base=relabelled(RELEASE, 0.0, rows),
                standalone=relabelled(RELEASE, 1.0, rows),
                control=relabelled(CONTROL, 1.0, rows) if has_control else None,
                control_base=relabelled(CONTROL, 0.0, rows) if has_control else None,
            )
            for rows in arena.spec.attacker.relabel_rows
        ],
        partners={name: accuracy(name, 1.0) for name in arena.partners},
        partners_base={name: accuracy(name, 0.0) for name in arena.partners},
        partners_chance={name: chance(name) for name in arena.partners},
    )


def _curve(arena: Arena, side: str) -> list[ScalePoint]:
    points = []
    for s in sorted(dict.fromkeys(arena.spec.scales)):
        points.append(scale_point(s, arena.evaluate(arena.alone(side, s), side, "test")))
    return points


def _attack(attacker: Attacker) -> dict[Key, Catch]:
    """All tiers of one side, by (attack, tier, labelled rows)."""
    arena, spec = attacker.arena, attacker.arena.spec.attacker
    found: dict[Key, Catch] = {}
    plan = [(name, attacker.shared) for name in (*spec.attacks, *spec.data_attacks)]
    plan += [(name, attacker.per_model) for name in spec.t3_attacks]
    for name, attempt in plan:
        before = arena.evaluations
        for tier, rows, catch in attempt(name):
            found[name, tier, rows] = replace(catch, evaluations=arena.evaluations - before)
    return found


def _result(
    key: Key,
    catches: dict[str, dict[Key, Catch]],
    references: References,
    retained: dict[str, Retained],
) -> AttackResult:
    name, tier, rows = key
    catch = catches[RELEASE][key]
    other = catches.get(CONTROL, {}).get(key)
    base, standalone = _levels(references, rows, RELEASE)
    return AttackResult(
        name=name,
        tier=tier,
        params=_params(catch),
        merged=catch.merged,
        retained=retained_skill(catch.merged, base, standalone),
        admissible=catch.admissible,
        unconstrained_retained=retained_skill(catch.unconstrained, base, standalone),
        partners={
            partner: PartnerScore(merged=accuracy, without_release=catch.without[partner])
            for partner, accuracy in catch.partners.items()
        },
        control_params=_params(other) if other else None,
        control_merged=other.merged if other else None,
        control_retained=(
            retained_skill(other.merged, *_levels(references, rows, CONTROL)) if other else None
        ),
        control_admissible=other.admissible if other else None,
        relabel_rows=rows,
        evaluations=catch.evaluations,
        interval=interval(retained[RELEASE][key]),
        control_interval=interval(retained[CONTROL][key]) if other else None,
        tool=_tool(catch),
        control_tool=_tool(other) if other else {},
    )


def _levels(references: References, rows: int, side: str) -> tuple[float, float]:
    """One side's base and standalone accuracy, read in the way the attacker reads the merge."""
    read = next((r for r in references.relabelled if r.rows == rows), references)
    if side == RELEASE:
        return read.base, read.standalone
    assert read.control_base is not None
    assert read.control is not None
    return read.control_base, read.control


def _params(catch: Catch) -> dict[str, Any]:
    mixture = catch.mixture
    return {
        **{f"c[{n}]": _coefficient(mixture.of(n)) for n in mixture.members},
        **dict(mixture.params),
    }


def _tool(catch: Catch) -> dict[str, str]:
    """What another library was told, if one made the merge."""
    tool, mixture = load_attacks().get(catch.attack).tool, catch.mixture
    if tool is None:
        return {}
    return tool.recorded(mixture.members, mixture.coefficients, dict(mixture.params))


def _coefficient(parts: tuple[float, ...]) -> float | str:
    return parts[0] if len(parts) == 1 else " / ".join(f"{c:g}" for c in parts)


def _frontier(attackers: dict[str, Attacker]) -> list[FrontierPoint]:
    return [
        FrontierPoint(
            attack=name,
            params={n: fmean(mixture.of(n)) for n in mixture.members},
            retained=retained,
            partners_retained=kept,
            of="release" if side == RELEASE else "control",
        )
        for side, attacker in attackers.items()
        for name in attacker.arena.spec.attacker.t3_attacks
        for mixture, retained, kept in attacker.frontier(name)
    ]


def _release_info(arena: Arena) -> ReleaseInfo:
    release, spec = arena.members[RELEASE], arena.spec
    record = release_record(spec.release.path)
    trap: dict[str, Any] = record.get("trap2", {})
    known = "low" in trap and "high" in trap
    return ReleaseInfo(
        name=spec.release.path.name,
        kind=release.update.kind,
        task=spec.release.task.name,
        classes=release.evaluators["test"].reading.classes,
        partners=list(arena.partners),
        base=Path(spec.base).name,
        has_control=CONTROL in arena.sides,
        trained_range=(trap["low"], trap["high"]) if known else None,
        trained_band=trap.get("band"),
        recipe=recipe_of(record),
    )
