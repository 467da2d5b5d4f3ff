"""`trap2 audit`: references, scale curves, the tuned attacker on both sides, verdict, record."""

import time
from pathlib import Path
from typing import Any

from trap2.auditing.arena import CONTROL, RELEASE, Arena
from trap2.auditing.attacker import Attacker, Catch, chance
from trap2.auditing.verdict import LIMITS, retained_skill, sentence, tier_results
from trap2.errors import UserError
from trap2.files import read_json
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

Key = tuple[str, str, int]


def audit(spec: AuditSpec, progress: Progress = SILENT) -> Report:
    """Audit one release.

    Args:
        spec: The release, its base, control and partners, and what the attacker may spend.
        progress: Told what is being done.

    Returns:
        The record; nothing is written.

    Raises:
        UserError: An input is not acceptable.
    """
    started = time.monotonic()
    progress.say("reading releases and rows")
    arena = Arena(spec, progress)
    _check_rows(arena)
    progress.say("references and scale curves")
    references = _references(arena)
    curves = {side: _curve(arena, side) for side in arena.sides}
    attackers = {side: Attacker(arena, side) for side in arena.sides}
    catches = {side: _attack(attacker) for side, attacker in attackers.items()}
    attacks = [_result(arena, key, catches, references) for key in catches[RELEASE]]
    tiers = tier_results(attacks, CONTROL in arena.sides)
    cost = None if references.control is None else references.control - references.standalone
    release = arena.members[RELEASE]
    return Report(
        release=_release_info(arena),
        references=references,
        utility_cost=cost,
        scale_curve=curves[RELEASE],
        control_scale_curve=curves.get(CONTROL, []),
        attacks=attacks,
        frontier=_frontier(attackers, references),
        tiers=tiers,
        verdict=sentence(references, cost, tiers),
        limits=LIMITS,
        settings=spec.attacker.model_dump(mode="json"),
        versions=versions(),
        machine=machine(),
        seed=spec.seed,
        digests={"base": arena.base.digest}
        | {name: member.update.digest for name, member in arena.members.items()},
        rows={
            "validation": len(release.evaluators["validation"].labels),
            "test": len(release.evaluators["test"].labels),
            "evaluations": arena.evaluations,
        },
        created=now(),
        seconds=round(time.monotonic() - started, 1),
    )


def _check_rows(arena: Arena) -> None:
    """Labelled rows enough for every re-labelling, before anything slow is done."""
    wanted = max(arena.spec.attacker.relabel_rows)
    found = len(arena.members[RELEASE].evaluators["validation"].labels)
    if found < wanted:
        raise UserError(
            f"re-labelling with {wanted} rows needs as many validation rows, there are {found}; "
            "raise validation_rows, give more rows, or lower relabel_rows"
        )


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

    has_control = CONTROL in arena.sides
    return References(
        base=accuracy(RELEASE, 0.0),
        standalone=accuracy(RELEASE, 1.0),
        control=accuracy(CONTROL, 1.0) if has_control else None,
        chance=chance(arena.members[RELEASE].evaluators["test"].labels),
        relabelled=[
            RelabelledReferences(
                rows=rows,
                base=relabelled(RELEASE, 0.0, rows),
                standalone=relabelled(RELEASE, 1.0, rows),
                control=relabelled(CONTROL, 1.0, rows) if has_control else None,
            )
            for rows in arena.spec.attacker.relabel_rows
        ],
        partners={name: accuracy(name, 1.0) for name in arena.partners},
    )


def _curve(arena: Arena, side: str) -> list[ScalePoint]:
    points = []
    for s in sorted(dict.fromkeys(arena.spec.scales)):
        result = arena.evaluate(arena.alone(side, s), side, "test")
        points.append(ScalePoint(s=s, accuracy=result.accuracy, loss=result.loss))
    return points


def _attack(attacker: Attacker) -> dict[Key, Catch]:
    """All tiers of one side, by (attack, tier, labelled rows)."""
    spec = attacker.arena.spec.attacker
    found: dict[Key, Catch] = {}
    for name in spec.attacks:
        for tier, rows, catch in attacker.shared(name):
            found[name, tier, rows] = catch
    for name in spec.t3_attacks:
        for tier, rows, catch in attacker.per_model(name):
            found[name, tier, rows] = catch
    return found


def _result(
    arena: Arena, key: Key, catches: dict[str, dict[Key, Catch]], references: References
) -> AttackResult:
    name, tier, rows = key
    catch = catches[RELEASE][key]
    other = catches.get(CONTROL, {}).get(key)
    base, standalone, control = _levels(references, rows)
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
            retained_skill(other.merged, base, control) if other and control is not None else None
        ),
        control_admissible=other.admissible if other else None,
        relabel_rows=rows,
        evaluations=arena.evaluations,
    )


def _levels(references: References, rows: int) -> tuple[float, float, float | None]:
    """Base, standalone and control, read in the way the attacker reads the merge."""
    if rows == 0:
        return references.base, references.standalone, references.control
    read = next(r for r in references.relabelled if r.rows == rows)
    return read.base, read.standalone, read.control


def _params(catch: Catch) -> dict[str, Any]:
    mixture = catch.mixture
    return {
        **{f"c[{n}]": c for n, c in zip(mixture.members, mixture.coefficients, strict=True)},
        **dict(mixture.params),
    }


def _frontier(attackers: dict[str, Attacker], references: References) -> list[FrontierPoint]:
    points = []
    for side, attacker in attackers.items():
        spec = attacker.arena.spec.attacker
        base, standalone, control = _levels(references, max(spec.relabel_rows))
        top = standalone if side == RELEASE else control
        assert top is not None
        for name in spec.t3_attacks:
            for mixture, accuracy, kept in attacker.frontier(name):
                points.append(
                    FrontierPoint(
                        attack=name,
                        params=dict(zip(mixture.members, mixture.coefficients, strict=True)),
                        retained=retained_skill(accuracy, base, top),
                        partners_retained=kept,
                        of="release" if side == RELEASE else "control",
                    )
                )
    return points


def _release_info(arena: Arena) -> ReleaseInfo:
    release, spec = arena.members[RELEASE], arena.spec
    record = spec.release.path / "trap2.json"
    trap: dict[str, Any] = read_json(record).get("trap2", {}) if record.is_file() else {}
    known = "low" in trap and "high" in trap
    return ReleaseInfo(
        name=spec.release.path.name,
        kind=release.update.kind,
        task=spec.release.task.name,
        classes=len(spec.release.task.classes),
        partners=list(arena.partners),
        base=Path(spec.base).name,
        has_control=CONTROL in arena.sides,
        trained_range=(trap["low"], trap["high"]) if known else None,
        trained_band=trap.get("band"),
    )
