"""Builds records of audits that never ran, with numbers of the size real ones have."""

from typing import Any

from trap2.schema import (
    AttackResult,
    FrontierPoint,
    PartnerScore,
    RecoveryPoint,
    References,
    RelabelledReferences,
    ReleaseInfo,
    Report,
    RoutingResult,
    ScalePoint,
    TierResult,
)

SCALES = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0, 1.1, 1.3, 1.5)
PROTECTED = (0.49, 0.021, 0.017, 0.018, 0.83, 0.95, 0.905, 0.045, 0.018)
PLAIN = (0.56, 0.71, 0.893, 0.942, 0.953, 0.956, 0.957, 0.96, 0.955)
PARTNERS = {"sst2": 0.828, "agnews": 0.892, "subj": 0.93}
ROWS = (30, 300)
HOSTILE = (
    "<script>alert(1)</script>\"><img src=x onerror=alert(2)> '$x_1$ `a`|*b* \x1b[31m\r\n"
    "\u202eevil \u05e9 --> " + "A" * 10_000
)
"""A name that tries to be markup, maths, a terminal's command, and to run the other way."""


def build_report(
    control: bool = True, name: str = "trec6-protected", partners: dict[str, float] = PARTNERS
) -> Report:
    """A valid record; `name` goes wherever a stranger's text can go."""
    return Report(
        release=ReleaseInfo(
            name=name,
            kind="lora",
            task="trec6" if name == "trec6-protected" else name,
            classes=6,
            partners=list(partners),
            base="all-MiniLM-L6-v2",
            has_control=control,
            trained_range=(0.2, 1.6),
            trained_band=0.05,
        ),
        references=References(
            base=0.51,
            standalone=0.95,
            control=0.956 if control else None,
            chance=1 / 6,
            relabelled=[
                RelabelledReferences(
                    rows=rows, base=base, standalone=0.947, control=0.953 if control else None
                )
                for rows, base in zip(ROWS, (0.553, 0.614), strict=True)
            ],
            partners=partners,
        ),
        utility_cost=0.006 if control else None,
        scale_curve=_curve(PROTECTED),
        control_scale_curve=_curve(PLAIN) if control else [],
        attacks=_attacks(control, partners, "ties" if name == "trec6-protected" else name),
        frontier=_frontier(control, "per model"),
        recovery=_recovery(control, partners),
        routing=[
            RoutingResult(
                name="emr",
                params={},
                accuracy=0.9,
                retained=0.886,
                partners=partners,
                control_params={} if control else None,
                control_accuracy=0.93 if control else None,
                control_retained=0.942 if control else None,
            )
        ],
        tiers=_tiers(control),
        verdict=f"{name} holds against T1 and T2 and leaks against T3: an attacker with one "
        "coefficient per model keeps 41.2% of its skill at an admissible cost.",
        limits=[
            "Partners are three text classifiers.",
            f"Seen on {name} only.",
        ],
        settings={"grid": [0.1, 0.3, 0.5, 0.7], "share": 0.95, "path": f"/data/{name}"},
        versions={"trap2": "0.1.0", "torch": "2.13.0"},
        machine={"cpu": "x86_64, 2 cores", "python": "3.11.9"},
        seed=7,
        digests={"release": "sha256:" + "ab" * 32, "base": "sha256:" + "cd" * 32},
        rows={"validation": 300, "test": 500},
        created="2025-01-31T12:00:00+00:00",
        seconds=412.6,
    )


def with_intervals(report: Report) -> Report:
    """The same record with an interval around everything that can have one."""

    def around(value: float | None, by: float = 0.05) -> tuple[float, float] | None:
        return None if value is None else (max(0.0, value - by), min(1.0, value + by))

    tiers = {
        tier: result.model_copy(
            update={
                "interval": around(result.unmergeability),
                "control_interval": around(result.control_unmergeability),
            }
        )
        for tier, result in report.tiers.items()
    }
    attacks = [
        attack.model_copy(
            update={
                "interval": around(attack.retained),
                "control_interval": around(attack.control_retained),
            }
        )
        for attack in report.attacks
    ]
    cost = None if report.utility_cost is None else (-0.014, 0.026)
    return report.model_copy(
        update={"tiers": tiers, "attacks": attacks, "utility_cost_interval": cost}
    )


def _curve(accuracies: tuple[float, ...]) -> list[ScalePoint]:
    return [
        ScalePoint(s=s, accuracy=a, loss=3 * (1 - a))
        for s, a in zip(SCALES, accuracies, strict=True)
    ]


def _recovery(control: bool, partners: dict[str, float]) -> list[RecoveryPoint]:
    other = {
        "control_coefficient": 1.0,
        "control_accuracy": 0.91,
        "control_without_release": 0.7,
        "control_standalone": 0.95,
        "control_retained": 0.84,
        "control_admissible": True,
    }
    return [
        RecoveryPoint(
            method=method,
            reference=method == "distil",
            budget_rows=100,
            budget_steps=steps,
            coefficient=0.5,
            accuracy=0.72,
            without_release=0.7,
            standalone=0.95,
            retained=0.08,
            unconstrained=0.5,
            admissible=method != "probe",
            partners={p: PartnerScore(merged=a, without_release=a) for p, a in partners.items()},
            **(other if control else {}),
        )
        for method, steps in (("probe", 0), ("finetune_after", 60), ("distil", 60))
    ]


def _tiers(control: bool) -> Any:
    def control_of(u: float) -> float:
        return round(u / 30, 4)

    def tier(u: float, verdict: Any, worst: str, by_rows: dict[str, float]) -> TierResult:
        return TierResult(
            unmergeability=u,
            worst_attack=worst,
            control_unmergeability=control_of(u) if control else None,
            by_rows=by_rows,
            control_by_rows={n: control_of(v) for n, v in by_rows.items()} if control else {},
            verdict=verdict,
        )

    return {
        "T1": tier(1.0, "holds", "task_arithmetic", {}),
        "T2": tier(0.942, "holds", "ties", {"30": 0.987, "300": 0.942}),
        "T3": tier(0.588, "leaks", "per model", {"30": 0.644, "300": 0.588}),
    }


def _attacks(control: bool, partners: dict[str, float], hostile: str) -> list[AttackResult]:
    plans: list[tuple[str, Any, int, float, float, bool, dict[str, Any]]] = [
        ("task_arithmetic", "T1", 0, 0.02, 0.0, True, {"c": 0.5}),
        (hostile, "T1", 0, 0.026, 0.0, True, {"c": 0.7, "density": 0.2}),
        ("task_arithmetic", "T2", 30, 0.241, 0.0, True, {"c": 0.5}),
        ("task_arithmetic", "T2", 300, 0.614, 0.0, True, {"c": 0.4}),
        (hostile, "T2", 300, 0.633, 0.058, True, {"c": 0.6, "density": 0.2}),
        ("per model", "T3", 300, 0.751, 0.412, True, {"c_T": 0.95, "c": [0.4, 0.35, 0.3]}),
        ("shrunk partners", "T3", 300, 0.944, 0.991, False, {"c_T": 1.0, "c": [0.1] * 40}),
    ]

    def scores(share: float) -> dict[str, PartnerScore]:
        return {
            partner: PartnerScore(merged=share * accuracy, without_release=accuracy)
            for partner, accuracy in partners.items()
        }

    return [
        AttackResult(
            name=name,
            tier=tier,
            params=params,
            merged=merged,
            retained=retained,
            admissible=admissible,
            unconstrained_retained=max(retained, 0.93),
            partners=scores(0.97 if admissible else 0.81),
            control_params={"c": 0.5} if control else None,
            control_merged=0.896 if control else None,
            control_retained=0.965 if control else None,
            control_admissible=True if control else None,
            relabel_rows=rows,
            evaluations=40,
        )
        for name, tier, rows, merged, retained, admissible, params in plans
    ]


def _frontier(control: bool, attack: str) -> list[FrontierPoint]:
    """The release pays for skill with its partners' skill, the control hardly does."""
    price = {"release": 0.12, "control": 0.03} if control else {"release": 0.12}
    return [
        FrontierPoint(
            attack=attack,
            params={"c_T": step / 20},
            retained=step / 20,
            partners_retained=1.0 - cost * step / 20 - waste,
            of=of,
        )
        for of, cost in price.items()
        for waste in (0.0, 0.02, 0.05, 0.11)
        for step in range(21)
    ]
