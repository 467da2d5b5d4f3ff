"""The benchmarks: all import; that of all attacks, on pico releases, resumes and is complete."""

import importlib.util
import json
import statistics
from pathlib import Path
from types import ModuleType

import pytest
import torch

from auditing.shelf import stock
from trap2.attacks.attack import load_attacks
from trap2.auditing.arena import Arena
from trap2.recipes import AuditSpec

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def _loaded(name: str) -> ModuleType:
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.syspath_prepend(Path(__file__).parent / "attacks")  # as the command of undo.py does
    monkeypatch.syspath_prepend(BENCHMARKS)
    # Not by its name: that may also be a folder of tests.
    spec = importlib.util.spec_from_file_location(f"{name}_bench", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.undo()
    return module


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.stem)
def test_every_benchmark_imports_and_says_how_it_is_run(path):
    module = _loaded(path.stem)
    assert callable(module.main)
    assert f"python benchmarks/{path.name}" in str(module.__doc__)


@pytest.mark.parametrize(("name", "attacker"), [("first_bench", "ATTACKER")])
def test_figures_and_table_of_a_bench_are_those_of_its_runs(name, attacker):
    module = _loaded("first_bench")
    record = json.loads((BENCHMARKS.parent / "results" / f"{name}.json").read_text())
    runs = record["runs"]
    # Runs say themselves in which precision they were made.
    assert record["attacker"].items() >= getattr(module, attacker).items()
    assert record["figures"].items() >= module.figures(runs, "lora/default").items()
    mine = {k: r for k, r in runs.items() if k.startswith("lora/default/subj/")}
    cost = statistics.mean(r["utility_cost"] for r in mine.values())
    assert module.figures(mine, "lora/default")["utility_cost_max"] == pytest.approx(cost)
    written = (BENCHMARKS.parent / "results" / f"{name}.md").read_text()
    assert written.endswith(module.table(runs))


def attack(tier: str, rows: int, kept: float, control: float) -> dict:
    return {"tier": tier, "relabel_rows": rows, "retained": kept, "control_retained": control}


def audited(cost: float, *attacks: dict) -> dict:
    references = {"chance": 0.3, "base": 0.5, "control": 0.9, "standalone": 0.9 - cost}
    return {"references": references, "utility_cost": cost, "attacks": list(attacks)}


@pytest.fixture
def results(tmp_path):
    """Two seeds of the default on one text task, another setting, and a language model."""
    first = audited(0.02, attack("T1", 0, 0.1, 0.9), attack("T1", 0, 0.2, 1.0))
    second = audited(0.04, attack("T1", 0, 0.0, 0.8), attack("T2", 300, 0.5, 0.7))
    second["attacks"] += [attack("T2", 30, 0.9, 0.9), attack("T3", 30, 0.6, 0.9)]
    text = {"lora/default/subj/0": first, "lora/default/subj/1": second}
    text["lora/paper/subj/0"] = audited(0.5, attack("T1", 0, 1.0, 1.0))
    (tmp_path / "first_bench.json").write_text(json.dumps({"runs": text}))
    language = {"full/0": audited(0.01, attack("T1", 0, 0.3, 1.0))}
    (tmp_path / "language.json").write_text(json.dumps({"runs": language}))
    return tmp_path


def test_what_is_protected_is_averaged_over_seeds_and_then_over_tasks(results):
    module = _loaded("protection")
    module.RESULTS, module.OUT = results, results / "protection.json"
    module.main()
    record = json.loads((results / "protection.json").read_text())
    text = record["lines"]["text/lora/subj"]
    assert record["lines"].keys() == {"text/lora/subj", "language/full/shakespeare"}
    assert (text["seeds"], text["t1_unmergeability"]) == ([0, 1], pytest.approx((0.8 + 1.0) / 2))
    assert record["figures"] == pytest.approx(
        {
            "utility_cost_mean": (0.03 + 0.01) / 2,
            "utility_cost_max": 0.03,
            "t1_lines": 2,
            "t2_lines": 1,
            "t3_lines": 1,
            "t1_unmergeability_mean": (0.9 + 0.7) / 2,
            "t1_unmergeability_mean_control": (0.1 + 0.0) / 2,
            "t2_unmergeability_mean": 0.5,  # of the only run that has it, 300 rows alone
            "t2_unmergeability_mean_control": 0.3,
            "t3_unmergeability_mean": 0.4,
            "t3_unmergeability_mean_control": 0.1,
        },
        abs=1e-9,
    )
    written = (results / "protection.md").read_text()
    assert written.count("\n| ") == 3  # the head and two lines
    assert "| 30.0 | 50.0 | 90.0 | 87.0 | 3.0 | 90 (10) | 50 (30) | 40 (10) |" in written
    assert "| 30.0 | 50.0 | 90.0 | 89.0 | 1.0 | 70 (0) | - | - |" in written


def test_what_does_not_merge_without_a_trap_is_no_evidence_for_one():
    module = _loaded("protection")
    line = {"utility_cost": 0.0, "t1_unmergeability": 1.0, "t1_unmergeability_control": 0.9}
    other = {**line, "utility_cost": 0.02, "t1_unmergeability_control": 0.2}
    assert module.figures([line, other]) == {
        "utility_cost_mean": 0.01,
        "utility_cost_max": 0.02,
        "t1_lines": 1,
        "t1_unmergeability_mean": 1.0,
        "t1_unmergeability_mean_control": 0.2,
        "t2_lines": 0,
        "t3_lines": 0,
    }
    assert module._tier(line, "T1") == "~~100 (90)~~"
    assert module._tier(other, "T1") == "100 (20)"


@pytest.fixture(scope="module")
def bench(pico_base):
    """The benchmark's module, with one set of pico releases."""
    module = _loaded("attacks")
    shelf = stock(pico_base)
    pico = {k: v for k, v in shelf.audit("lora").items() if k not in ("attacker", "scales", "seed")}
    module.QUADRUPLES = {"pico": lambda chosen: pico}
    return module


@pytest.fixture
def run(bench, tmp_path):
    def go(*attacks: str) -> dict:
        where = ["--out", str(tmp_path), "--work", str(tmp_path / "work"), "--rows", "20"]
        bench.main(["--attacks", *attacks, *where])
        return json.loads((tmp_path / "attacks.json").read_text())

    return go


def test_it_keeps_what_it_has_and_adds_what_is_missing(bench, run, tmp_path):
    first = run("task_arithmetic")
    assert [*first["runs"]] == ["pico/task_arithmetic"]
    second = run("task_arithmetic", "iso_c", "fisher")
    assert [*second["runs"]] == ["pico/task_arithmetic", "pico/iso_c", "pico/fisher"]
    assert second["runs"]["pico/task_arithmetic"] == first["runs"]["pico/task_arithmetic"]
    tiers = {s["tier"] for one in second["runs"].values() for s in one["scores"]}
    assert tiers == {"T1", "T2", "T3", "T4"}
    found = second["figures"]
    for tier in tiers:
        kept = [
            s["control_retained"]
            for one in second["runs"].values()
            for s in one["scores"]
            if s["tier"] == tier
        ]
        assert found[f"control_retained_best_{tier.lower()}"] == max(kept)
    lines = (tmp_path / "attacks.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[6:]] == [
        *("| task_arithmetic", "| iso_c", "| fisher")
    ]


def test_trained_attacks_stand_beside_their_reference(run):
    found = run("probe", "distil")["runs"]
    assert {s["tier"] for s in found["pico/probe"]["scores"]} == {"T5"}
    assert {s["tier"] for s in found["pico/distil"]["scores"]} == {"reference"}


def test_routing_has_a_column_of_its_own_and_is_the_best_of_no_tier(run):
    found = run("emr")
    (score,) = found["runs"]["pico/emr"]["scores"]
    assert score["tier"] == "routing"
    assert not any(name.startswith("control_retained_best") for name in found["figures"])


def test_an_attack_that_cannot_be_audited_says_why(bench, run, monkeypatch):
    monkeypatch.setitem(bench.GRIDS, "ties", {"dense": [1.0]})
    found = run("ties")
    assert found["runs"]["pico/ties"]["error"].startswith("attacker.grids.ties.dense is no param")
    assert "control_retained_best_t1" not in found["figures"]


def test_the_figures_take_the_set_where_the_best_attack_keeps_least(bench):
    def one(kept):
        score = {"tier": "T1", "control_retained": kept, "retained": 0.1}
        return {"scores": [score, {**score, "control_retained": 0.2}]}

    runs = {"a/x": one(0.9), "a/y": one(0.95), "b/x": one(0.5), "mobilenet/x": one(0.3)}
    found = bench.figures(runs)
    assert found["control_retained_best_t1"] == 0.5
    assert found["control_retained_best_t1_images"] == 0.3
    apart = ("peft_", "mergekit_", "emr", "tall_masks")  # routing is no merging
    own = [name for name in load_attacks() if not name.startswith(apart)]
    assert found["methods_listed"] == len(own) + 3
    record = json.loads((BENCHMARKS.parent / "results" / "merging.json").read_text())
    assert found.items() >= record["figures"].items()


def test_every_name_in_its_plan_is_an_attack(bench):
    for name in [*bench.COEFFICIENTS, *bench.GRIDS, *bench.PER_MODEL]:
        entry = load_attacks().get(name)
        assert {*bench.GRIDS.get(name, {})} <= {*entry.grid}


def test_a_setting_has_protected_at_the_fewest_steps_that_hold_within_a_point():
    def run(steps: int, t1: float, cost: float) -> dict:
        return {"steps": steps, "seconds": 10.0 * steps, "t1_unmergeability": t1} | {
            "utility_cost": cost
        }

    runs = {
        "default/600/0": run(600, 1.0, 0.0),
        "default/150/0": run(150, 1.0, 0.02),
        "default/300/0": run(300, 0.9, 0.01),
        "paper_0.1/1200/0": run(1200, 0.89, 0.0),
    }
    assert _loaded("steps_to_protect").figures(runs) == {
        "default_steps": 300,
        "default_seconds": 3000.0,
        "default_steps_tried_max": 600,
        "paper_0.1_steps_tried_max": 1200,
    }


def test_handling_changes_what_it_says_and_nothing_else(pico_base):
    """Rounding: linear layers alone, by less than a step; noise: what was trained alone."""
    module = _loaded("handling")
    content = stock(pico_base).audit("lora")
    arena = Arena(AuditSpec.model_validate(content))
    vector, base = dict(arena.members["release"].vector.items()), arena.base
    ways = module.changes(arena).items()
    made = {name: module.changed(arena, "release", change) for name, change in ways}
    for name, weight in made["as released"].items():
        expected = base.tensor(name) + vector.get(name, torch.zeros(()))
        assert torch.equal(weight, expected)
        assert torch.equal(made["bfloat16"][name], expected.bfloat16())
        linear = name.endswith(("query.weight", "key.weight", "value.weight", "dense.weight"))
        for way in ("int8", "NF4"):
            assert torch.equal(made[way][name].float(), expected) != linear, name
        for way in module.NOISE:
            assert torch.equal(made[way][name], expected) != (name in vector), name
    W = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    for rounded, half_a_step in ((module._int8(W), 0.5 / 127), (module._nf4(W), 0.16)):
        assert (rounded.float() - W).abs().max() <= 1.01 * half_a_step * W.abs().max()
    merged = module.merged_by_peft(arena, arena.members["release"].update.folder)
    for name, weight in made["as released"].items():
        torch.testing.assert_close(merged[name], weight)
