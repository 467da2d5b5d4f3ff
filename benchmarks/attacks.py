"""Every listed attack on a protected release and on its control, with what each of them costs.

    TRAP2_DATA=/path/to/data python benchmarks/attacks.py

Three sets of releases, each of one protected release, its control and partners: MiniLM with LoRA
and in full on the text tasks of `first_bench.py` (`trec6` protected), and MobileNetV2 in full on
the image tasks of `images.py` (`kmnist10k` protected), whose batch-norm statistics are worked out
again after every merge; a `--work` that holds releases of those benches spares training them. Each
attack has an audit of its own with a few values of its coefficient and parameters, so that all of
them take minutes: this says which attacks work at all, not what the strongest attacker gets.

Writes `results/attacks.json` and `.md` after every attack. What the JSON holds is kept, so a run
can be cut short and gone on with; audits share one ledger. `--quadruples`, `--attacks` and `--rows`
choose. Methods that other libraries make (`peft_...`, `mergekit_...`) run when named, and are not
counted among the methods listed.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import first_bench
import images
from trap2.attacks.attack import ROUTING, load_attacks
from trap2.auditing.audit import audit
from trap2.auditing.ledger import Ledger
from trap2.errors import Trap2Error, UserError
from trap2.files import read_json, write_json, write_text
from trap2.progress import audit_bar
from trap2.provenance import machine, now, versions
from trap2.recipes import AuditSpec
from trap2.schema import Report

RESULTS = first_bench.RESULTS
SUM, MEAN, WAY = [0.4, 0.6, 0.8, 1.0], [1.0, 1.5, 2.0, 3.0], [0.3, 0.5, 0.7]
AVERAGING = ("ties", "dare_ties", "della", "pcb", "karcher", "iso_c", "iso_cts", "cart")
AVERAGING += ("ties_knots", "ties_core", "regmean", "regmean_pp", "chain_of_merges", "fisher")
COEFFICIENTS: dict[str, list[float]] = {
    **dict.fromkeys(AVERAGING, MEAN),
    **dict.fromkeys(("slerp", "nuslerp"), WAY),
    **{name: [0.4, 0.8] for name in ("adamerging", "prodistill", "distac")},
    "model_stock": [1.0, 4.0, 16.0],
}
"""Shared coefficients by attack; `SUM` for all others."""

GRIDS: dict[str, dict[str, list[float]]] = {
    "ties": {"density": [0.2, 1.0]},
    "ties_sum": {"density": [0.2]},
    "ties_knots": {"density": [0.2]},
    "ties_core": {"density": [0.2]},
    "dare_ties": {"drop": [0.5]},
    "dare_linear": {"drop": [0.5], "seed": [0]},
    "della": {"density": [0.5]},
    "breadcrumbs": {"density": [0.5]},
    "consensus": {"strictness": [0.4], "votes": [2]},
    "pcb": {"ratio": [0.2]},
    "lines": {"first": [0.6]},
    "layer_groups": {"early": [0.5, 1.0], "late": [1.0]},
    "nuslerp": {"scale": [1.4]},
    "wudi": {"pull": [0.03]},
    "iso_cts": {"common": [0.8]},
    "cart": {"rank_share": [0.16]},
    "truncated": {"rank_kept": [0.5]},
    "pruned": {"density": [0.1]},
    "thinned": {"drop": [0.5]},
    "rounded": {"bits": [4]},
    "noisy": {"noise": [0.2]},
    "regmean": {"alpha": [0.9]},
    "adamerging": {"steps": [30]},
    "prodistill": {"steps": [30]},
    "distac": {"scale": [0.5], "steps": [30]},
}
"""Values of an attack's own parameters; its own grid where it is not named."""

PER_MODEL = ("task_arithmetic", "ties", "ties_sum", "lines", "karcher", "tsv")
PER_MODEL += ("depth_thirds", "depth_sixths")
"""Attacks that are also tried with one coefficient per model."""

T3 = {"t3_values": [0.3, 0.6, 1.0], "t3_starts": [0.4], "t3_sweeps": 1}
TRAINED = {
    "recovery_steps": [30, 100],
    "recovery_coefficients": [0.5, 0.8],
    "recovery_learning_rate": 1e-4,
}
METHODS = ("probe", "finetune_before", "finetune_after", "distil")
TIERS = ("T1", "T2", "T3", "T4", "T5")


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, then write the results from what is there."""
    chosen = _arguments(arguments)
    out = chosen.out / "attacks.json"
    for quadruple in chosen.quadruples:
        settings: dict[str, Any] = {}
        for name in chosen.attacks:
            if f"{quadruple}/{name}" in known(out):
                continue
            settings = settings or QUADRUPLES[quadruple](chosen)
            found = _tried(name, settings, chosen)
            write_results(out, {**known(out), f"{quadruple}/{name}": found})
    write_results(out, known(out))


def known(out: Path) -> dict[str, Any]:
    """The attacks that the results file holds."""
    runs: dict[str, Any] = read_json(out)["runs"] if out.is_file() else {}
    return runs


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    top = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    every = [*load_attacks(), *METHODS]
    own = [name for name in every if name in METHODS or load_attacks().get(name).tool is None]
    top.add_argument("--quadruples", nargs="+", default=[*QUADRUPLES], choices=[*QUADRUPLES])
    top.add_argument("--attacks", nargs="+", default=own, choices=every)
    top.add_argument("--rows", type=int, default=150, help="validation rows; twice as many test")
    top.add_argument("--seed", type=int, default=0)
    first_bench.add_precision(top)
    top.add_argument("--work", type=Path, default=Path("build/attacks"))
    top.add_argument("--out", type=Path, default=RESULTS)
    return top.parse_args(arguments)


def _data() -> Path:
    data = Path(os.environ.get("TRAP2_DATA", ""))
    if not (data / "text").is_dir():
        raise UserError(f"TRAP2_DATA: no folder {data / 'text'}; set it to the folder of the data")
    return data


def _quadruple(
    bench: first_bench.Bench, method: str, data: Path, chosen: argparse.Namespace
) -> dict[str, Any]:
    """An audit of the first task protected, the others its partners; trained if need be."""

    def made(setting: str, name: str) -> dict[str, Any]:
        of = (chosen.work, data, method, setting, name, chosen.seed, bench)
        path = first_bench.make_release(*of).absolute()
        return {"path": str(path), "task": bench.section(data, name)}

    protected, *partners = bench.tasks
    return {
        "base": str(bench.base(data)),
        "release": made("default", protected),
        "control": made("control", protected)["path"],
        "partners": [made("control", name) for name in partners],
        "attacker": {k: v for k, v in bench.attacker.items() if k in OF_THE_BENCH},
    }


def _text(method: str, chosen: argparse.Namespace) -> dict[str, Any]:
    bench = first_bench.text_bench(chosen.precision)
    return _quadruple(bench, method, _data() / "text", chosen)


OF_THE_BENCH = ("precision", "recompute_statistics")
QUADRUPLES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "lora": lambda chosen: _text("lora", chosen),
    "full": lambda chosen: _text("full", chosen),
    "mobilenet": lambda chosen: _quadruple(images.IMAGES, "full", _data(), chosen),
}


def attacker(name: str, rows: int) -> dict[str, Any]:
    """What is tried of one attack, as the key `attacker` of an audit."""
    lists: dict[str, list[str]] = {"attacks": [], "t3_attacks": [], "data_attacks": []}
    if name in METHODS:
        lists["recovery"] = [name]
    elif ROUTING in load_attacks().get(name).tiers:
        lists["routing"] = [name]
    elif load_attacks().get(name).needs_data:
        lists["data_attacks"] = [name]
    else:
        lists["attacks"] = [name]
        lists["t3_attacks"] = [name] if name in PER_MODEL else []
    return {
        **lists,
        "coefficients": COEFFICIENTS.get(name, SUM),
        "grids": {name: GRIDS[name]} if name in GRIDS else {},
        "refine": 0,
        **(T3 if name in PER_MODEL else {}),
        **({"recovery_rows": [min(30, rows // 2)], **TRAINED} if name in METHODS else {}),
        "relabel_rows": [rows],
        "validation_rows": rows,
        "test_rows": 2 * rows,
        "unlabelled_rows": min(100, rows),
    }


def _tried(name: str, settings: dict[str, Any], chosen: argparse.Namespace) -> dict[str, Any]:
    """One audit with one attack; why it could not be made, where it could not."""
    more = {**attacker(name, chosen.rows), **settings.get("attacker", {})}
    spec = AuditSpec.model_validate(
        {**settings, "attacker": more, "scales": [0.0, 1.0], "seed": chosen.seed}
    )
    with audit_bar() as progress, Ledger(chosen.work / "ledger") as ledger:
        try:
            found = _summary(audit(spec, progress, ledger))
        except Trap2Error as error:
            found = {"error": str(error), "settings": more}
    return {**found, "seed": chosen.seed}


def _summary(report: Report) -> dict[str, Any]:
    """What table and figures need of one audit."""
    record = report.model_dump(mode="json")
    kept = ("tier", "relabel_rows", "retained", "control_retained", "admissible")
    kept += ("control_admissible", "unconstrained_retained", "params", "control_params")
    scores = [{key: entry[key] for key in kept} for entry in record["attacks"]]
    # The reference of T5 is no attack; here it stands beside them under a name of its own.
    scores += [
        {
            "tier": "reference",
            "relabel_rows": point["budget_rows"],
            **{key: point[key] for key in ("retained", "control_retained")},
        }
        for point in record["recovery"]
        if point["reference"]
    ]
    scores += [
        {"tier": ROUTING, **{key: entry[key] for key in ("retained", "control_retained")}}
        for entry in record["routing"]
    ]
    return {
        "scores": scores,
        "evaluations": record["rows"]["evaluations"],
        "seconds": record["seconds"],
        "references": record["references"],
        "settings": record["settings"],
        "machine": record["machine"],
        "created": record["created"],
    }


def best(runs: dict[str, Any], quadruple: str, tier: str, key: str) -> float | None:
    """The most skill any attack of a tier keeps in one set of releases; None if none was tried."""
    kept = [
        score[key]
        for name, run in runs.items()
        if name.startswith(f"{quadruple}/")
        for score in run.get("scores", ())
        if score["tier"] == tier and score[key] is not None
    ]
    return max(kept, default=None)


def figures(runs: dict[str, Any]) -> dict[str, float]:
    """The named numbers: the best attack of each tier, in the set where it keeps least.

    Of the text tasks; those of images, whose merges without a trap keep less, have their own.
    """
    listed = map(load_attacks().get, load_attacks())
    own = [entry for entry in listed if entry.tool is None and ROUTING not in entry.tiers]
    found: dict[str, float] = {"methods_listed": len(own) + len(METHODS) - 1}
    sets = dict.fromkeys(name.split("/")[0] for name in runs)
    for tier, of in product(TIERS, ("", "_images")):
        mine = [one for one in sets if (one == "mobilenet") is (of == "_images")]
        kept = [best(runs, one, tier, "control_retained") for one in mine]
        known_ones = [value for value in kept if value is not None]
        if known_ones:
            found[f"control_retained_best_{tier.lower()}{of}"] = min(known_ones)
    merging = RESULTS / "merging.json"
    if merging.is_file():
        found |= read_json(merging)["figures"]
    return found


def table(runs: dict[str, Any]) -> str:
    """Markdown: one table for each set of releases, one line an attack."""
    parts = []
    for one in dict.fromkeys(name.split("/")[0] for name in runs):
        lines = ["| attack | " + " | ".join(COLUMNS) + " | evaluations | seconds |"]
        lines.append("|---" * (len(COLUMNS) + 3) + "|")
        for key, run in runs.items():
            if key.startswith(f"{one}/"):
                lines.append(_line(key.split("/")[1], run))
        parts.append(f"## {one}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


COLUMNS = (*TIERS, "reference", ROUTING)


def _line(name: str, run: dict[str, Any]) -> str:
    if "error" in run:
        return f"| {name} | {run['error']} |" + " |" * (len(COLUMNS) + 1)
    cells = [name]
    for tier in COLUMNS:
        pair = [
            max((s[key] for s in run["scores"] if s["tier"] == tier), default=None)
            for key in ("control_retained", "retained")
        ]
        cells.append("" if None in pair else " / ".join(f"{100 * value:.0f}" for value in pair))
    return "| " + " | ".join([*cells, str(run["evaluations"]), f"{run['seconds']:.0f}"]) + " |"


def write_results(out: Path, runs: dict[str, Any]) -> None:
    """The JSON and its tables, whole or absent."""
    sets = [*dict.fromkeys(name.split("/")[0] for name in runs)]
    tiers = {
        one: {
            tier: {key: best(runs, one, tier, key) for key in ("control_retained", "retained")}
            for tier in TIERS
        }
        for one in sets
    }
    record = {
        "figures": figures(runs),
        "command": " ".join(["python benchmarks/attacks.py", *map(shlex.quote, sys.argv[1:])]),
        "machine": machine(),
        "versions": versions(),
        "seeds": [*dict.fromkeys(run["seed"] for run in runs.values())],
        "created": now(),
        "best": tiers,
        "runs": runs,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, record)
    note = "Retained skill in per cent, control / protected, each the best of its tier. Few values "
    note += "are tried of each attack. Evaluations and seconds are those of an audit with that "
    note += "attack alone, on both sides, without what earlier ones had evaluated.\n\n"
    write_text(out.with_suffix(".md"), note + table(runs))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
