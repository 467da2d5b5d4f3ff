"""What the default protects, over all benches: text, images and language in one table.

    python benchmarks/protection.py

Reads `results/first_bench.json`, `images.json` and `language.json`, trains nothing, and writes
`results/protection.json` and `.md`. Each line is one task and way of training under the default
setting, a mean over its seeds; the figures are means (or the worst) over lines. Unmergeability is
that of the worst attack of the tier itself, T2 with 300 labelled rows; language models are not
re-labelled, so they have no T2. Where the control keeps less than half of its skill in a merge,
merging fails without a trap too: such a line says nothing of protection and counts in no mean of
unmergeability, only in those of utility.
"""

import statistics
from pathlib import Path
from typing import Any

import first_bench
from trap2.files import read_json, write_json, write_text
from trap2.provenance import machine, versions

RESULTS = first_bench.RESULTS
OUT = RESULTS / "protection.json"
TIERS = {"T1": 0, "T2": 300, "T3": None}
"""Tiers, each with its labelled rows; None for any number of them."""

NUMBERS = ("chance", "base", "control", "standalone", "utility_cost")
MERGES = 0.5
"""Unmergeability of a control from which on it cannot be said to merge."""

NOTE = "In per cent, means over seeds; U is unmergeability (100: no merge that counts keeps any "
NOTE += (
    "skill), in brackets the control's; struck out where the control does not merge either, which "
)
NOTE += "says nothing of protection. Made by `python benchmarks/protection.py`.\n\n"


def main() -> None:
    """Write the table from what the benches have measured."""
    lines = {key: averaged(runs) for key, runs in sorted(default_runs(RESULTS).items())}
    record = {
        "figures": figures(list(lines.values())),
        "command": "python benchmarks/protection.py",
        "machine": machine(),
        "versions": versions(),
        "seeds": sorted({seed for line in lines.values() for seed in line["seeds"]}),
        "lines": lines,
    }
    write_json(OUT, record)
    write_text(OUT.with_suffix(".md"), NOTE + table(lines))


def default_runs(results: Path) -> dict[str, dict[int, Any]]:
    """The runs of the default, by bench, method and task, and then by seed."""
    found: dict[str, dict[int, Any]] = {}
    for bench, name in (("text", "first_bench"), ("image", "images")):
        for key, run in _runs(results / f"{name}.json").items():
            method, setting, task, seed = key.split("/")
            if setting == "default":
                found.setdefault(f"{bench}/{method}/{task}", {})[int(seed)] = run
    for key, run in _runs(results / "language.json").items():
        method, seed = key.split("/")
        found.setdefault(f"language/{method}/shakespeare", {})[int(seed)] = run
    return found


def _runs(path: Path) -> dict[str, Any]:
    runs: dict[str, Any] = read_json(path)["runs"] if path.is_file() else {}
    return runs


def averaged(runs: dict[int, Any]) -> dict[str, Any]:
    """One line: what was reached, and the unmergeability of release and control by tier."""
    every = [runs[seed] for seed in sorted(runs)]
    numbers = [{**r["references"], "utility_cost": r["utility_cost"]} for r in every]
    line: dict[str, Any] = {name: statistics.mean(n[name] for n in numbers) for name in NUMBERS}
    for tier, rows in TIERS.items():
        for suffix, key in (("", "retained"), ("_control", "control_retained")):
            found = [1 - max(k) for k in (_kept(run, tier, rows, key) for run in every) if k]
            if found:
                line[f"{tier.lower()}_unmergeability{suffix}"] = statistics.mean(found)
    return {**line, "seeds": sorted(runs)}


def _kept(run: dict[str, Any], tier: str, rows: int | None, key: str) -> list[float]:
    """The skill that the attacks of a tier keep."""
    tried = [a for a in run["attacks"] if a["tier"] == tier]
    return [a[key] for a in tried if rows is None or a["relabel_rows"] == rows]


def figures(lines: list[dict[str, Any]]) -> dict[str, float]:
    """The named numbers, each line counted once."""
    costs = [line["utility_cost"] for line in lines]
    found = {"utility_cost_mean": statistics.mean(costs), "utility_cost_max": max(costs)}
    for tier in TIERS:
        key = f"{tier.lower()}_unmergeability"
        counted = [line for line in lines if line.get(f"{key}_control", 1.0) < MERGES]
        found[f"{tier.lower()}_lines"] = len(counted)
        for suffix in ("", "_control") if counted else ():
            found[f"{key}_mean{suffix}"] = statistics.mean(line[key + suffix] for line in counted)
    return found


def table(lines: dict[str, dict[str, Any]]) -> str:
    """Markdown, one line a task and way of training."""
    head = "| bench | method | task | seeds | chance | base | control | protected | utility cost "
    head += "| U(T1) | U(T2, 300) | U(T3) |\n"
    rows = [head + "|---" * 12 + "|"]
    for key, line in lines.items():
        cells = [*key.split("/"), str(len(line["seeds"]))]
        cells += [f"{100 * line[name]:.1f}" for name in NUMBERS]
        rows.append("| " + " | ".join([*cells, *(_tier(line, tier) for tier in TIERS)]) + " |")
    return "\n".join(rows) + "\n"


def _tier(line: dict[str, Any], tier: str) -> str:
    key = f"{tier.lower()}_unmergeability"
    if key not in line:
        return "-"
    control = line[f"{key}_control"]
    cell = f"{100 * line[key]:.0f} ({100 * control:.0f})"
    return cell if control < MERGES else f"~~{cell}~~"


if __name__ == "__main__":
    main()
