"""mergekit's methods in its own process: equal to ours where the definitions are, and recorded."""

import stat
import sys
from importlib.util import find_spec

import pytest
import torch
import yaml

from trap2.attacks import mergekit_process
from trap2.attacks.attack import load_attacks, merge
from trap2.attacks.mergekit_methods import METHODS, configuration
from trap2.attacks.mergekit_process import Mergekit, installed_version, interpreter
from trap2.errors import Trap2Error, UserError


def lacking() -> str:
    """Why the tests that run mergekit cannot; nothing if they can."""
    try:
        installed_version()
    except UserError as error:
        return str(error)
    return ""


runs_mergekit = pytest.mark.skipif(bool(lacking()), reason=lacking() or "mergekit is there")
SHAPES = {"a.weight": (6, 5), "a.bias": (6,), "conv": (4, 3, 2, 2), "count": ()}


@pytest.fixture(scope="module")
def world():
    draw = torch.Generator().manual_seed(0)
    base, *updates = (
        {name: size * torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
        for size in (1.0, 0.3, 0.3, 0.3)
    )
    return base, updates


def made(name, world, coefficients, count=3, **params):
    base, updates = world
    return dict(merge(name, updates[:count], coefficients, base=base, **params))


def without_scalars(world):
    """The same without the tensor of one number, with which some of its methods are at fault."""
    base, *updates = ({n: t for n, t in part.items() if t.dim()} for part in (world[0], *world[1]))
    return base, updates


def by_tensor(name, world, coefficients, count=3, **params):
    """Our definition on each tensor by itself, as mergekit applies its own."""
    base, updates = world
    found = {}
    for tensor in base:
        parts = [{tensor: update[tensor]} for update in updates[:count]]
        found |= dict(merge(name, parts, coefficients, base=base, **params))
    return found


def close(one, other, atol=2e-6):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=atol)


@runs_mergekit
@pytest.mark.parametrize(
    ("theirs", "ours", "coefficients", "count", "params", "own"),
    [
        ("linear", "task_arithmetic", [0.5, -0.7, 1.2], 3, {}, {}),
        ("task_arithmetic", "task_arithmetic", [0.5, -0.7, 1.2], 3, {}, {}),
        ("ties", "ties", 1.5, 3, {"density": 1.0}, {"density": 1.0}),
        ("slerp", "slerp", 0.3, 2, {}, {}),
        ("nuslerp", "nuslerp", 0.3, 2, {}, {}),
        (
            *("breadcrumbs", "breadcrumbs", 0.7, 3),
            *({"density": 0.5, "gamma": 0.05}, {"density": 0.5, "gamma": 0.05}),
        ),
        ("dare_linear", "task_arithmetic", 0.7, 3, {"density": 1.0}, {}),
        ("della_linear", "task_arithmetic", 0.7, 3, {"density": 1.0, "epsilon": 0.0}, {}),
        ("ram", "task_arithmetic", 1 / 3, 3, {}, {}),  # nothing is unique: a mean, here taken once
    ],
)
def test_it_is_ours_where_the_definitions_are_the_same(
    world, theirs, ours, coefficients, count, params, own
):
    world = without_scalars(world) if theirs == "breadcrumbs" else world
    factor = 1.0 if theirs == "ram" else coefficients
    found = made(f"mergekit_{theirs}", world, factor, count, **params)
    close(found, by_tensor(ours, world, coefficients, count, **own))


@runs_mergekit
def test_model_stock_is_ours_below_a_right_angle(world):
    base, updates = world
    alike = [{n: updates[0][n] + 0.2 * u[n] for n in base} for u in updates]
    found = made("mergekit_model_stock", (base, alike), 1.5)
    expected = by_tensor("model_stock", (base, alike), 1.5)
    for name in ("a.weight", "conv"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


@runs_mergekit
def test_trimming_is_tensor_by_tensor_and_ours_goes_over_the_whole(world):
    base, updates = world
    uneven = [{n: d * (0.01 if n == "a.weight" else 1) for n, d in u.items()} for u in updates]
    found = made("mergekit_ties", (base, uneven), 1.0, density=0.5)
    close(
        {"a.weight": made("ties", (base, uneven), 1.0, density=0.4)["a.weight"]},
        {"a.weight": torch.zeros(6, 5)},
    )
    assert float(found["a.weight"].abs().max()) > 0


@runs_mergekit
@pytest.mark.parametrize("name", METHODS)
def test_every_method_merges_and_repeats_itself(world, name):
    entry = load_attacks().get(f"mergekit_{name}")
    params = next(entry.settings())
    count = 2 if entry.models[1] == 2 else 3
    world = without_scalars(world) if name in ("della", "della_linear") else world
    first = made(entry.name, world, 0.6, count, **params)
    assert {n: tuple(t.shape) for n, t in first.items()} == {
        n: tuple(t.shape) for n, t in world[0].items()
    }
    assert float(first["a.weight"].norm()) > 0
    again = made(entry.name, world, 0.6, count, **params)
    assert all(torch.equal(first[n], again[n]) for n in first)


@runs_mergekit
@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.kind in ("shares", "scaled")])
def test_without_a_place_for_it_the_coefficient_is_a_factor_of_the_whole(world, name):
    entry = load_attacks().get(f"mergekit_{name}")
    params, count = next(entry.settings()), 2
    once, twice, never = (made(entry.name, world, c, count, **params) for c in (1.0, 2.0, 0.0))
    close({n: 2 * t for n, t in once.items()}, twice)
    close(never, {n: torch.zeros_like(t) for n, t in once.items()})


@runs_mergekit
@pytest.mark.parametrize("name", ["della", "della_linear"])
def test_its_della_fails_on_a_tensor_of_one_number(world, name):
    with pytest.raises(Trap2Error, match="ended with 'RuntimeError: Expected p_in >= 0"):
        made(f"mergekit_{name}", world, 0.6, density=0.5, epsilon=0.15)


@runs_mergekit
def test_its_breadcrumbs_leaves_a_tensor_of_one_number_at_the_base(world):
    params = {"density": 0.5, "gamma": 0.05}
    assert float(made("mergekit_breadcrumbs", world, 0.7, **params)["count"]) == 0
    assert float(by_tensor("breadcrumbs", world, 0.7, **params)["count"]) != 0


@runs_mergekit
def test_masks_follow_the_seed(world):
    one, two = (made("mergekit_dare_linear", world, 1.0, density=0.5, seed=seed) for seed in (0, 1))
    assert not torch.equal(one["conv"], two["conv"])


@runs_mergekit
def test_a_tensor_that_one_model_does_not_change_stays_at_the_base_there(world):
    base, (one, two, _) = world
    found = dict(merge("mergekit_linear", [{"count": one["count"]}, two], 0.5, base=base))
    close(found, dict(merge("task_arithmetic", [{"count": one["count"]}, two], 0.5)))


@runs_mergekit
def test_what_fails_in_mergekit_is_said_and_the_next_merge_works(world, tmp_path):
    process = Mergekit(interpreter())
    with pytest.raises(
        Trap2Error,
        match=r"mergekit in .* ended with 'RuntimeError: Unimplemented .*'; try the same",
    ):
        process.merge("merge_method: nothing\nmodels: []\n", tmp_path / "out", 0)
    assert process._process is None
    made("mergekit_task_arithmetic", world, 1.0)


def stand_in(monkeypatch, tmp_path, then):
    """A process that is not mergekit's, with one merge to make."""
    worker = tmp_path / "worker.py"
    worker.write_text("import os, sys, time\nfor line in sys.stdin:\n    " + then)
    monkeypatch.setattr(mergekit_process, "WORKER", worker)
    process = Mergekit(sys.executable)
    return process, lambda: process.merge("models: []\n", process.folder / "out", 0)


def test_a_process_that_dies_does_not_hang_and_another_follows(monkeypatch, tmp_path):
    process, merge_one = stand_in(monkeypatch, tmp_path, "os._exit(1)")
    for _ in range(2):
        with pytest.raises(Trap2Error, match="ended with 'no message'; try the same merge by hand"):
            merge_one()
    process.close()
    assert not process.folder.exists()


def test_a_process_that_does_not_answer_is_ended(monkeypatch, tmp_path):
    monkeypatch.setattr(mergekit_process, "LIMIT", 0.5)
    process, merge_one = stand_in(monkeypatch, tmp_path, "time.sleep(60)")
    with pytest.raises(Trap2Error, match=r"ended with 'no answer within 0.5 s'; try"):
        merge_one()
    assert process._process is None
    process.close()


def test_a_merge_that_was_interrupted_answers_no_later_one(monkeypatch, tmp_path):
    process, merge_one = stand_in(monkeypatch, tmp_path, "print(os.getpid(), flush=True)")
    merge_one()
    first = process._process

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mergekit_process, "_answer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            merge_one()
    assert first.poll() is not None
    merge_one()
    assert process._process is not first
    process.close()


@runs_mergekit
def test_every_method_of_mergekit_is_here_but_the_one_that_merges_nothing():
    if find_spec("mergekit") is None:
        pytest.skip("mergekit is not in the interpreter that runs the tests")
    from mergekit.merge_methods.registry import registered_methods

    known = {method.spec.name: method for method in registered_methods()}
    assert {*known} - {*METHODS} == {"passthrough"}
    for name, method in METHODS.items():
        assert {*method.grid} - {"seed"} <= {p.name for p in known[name].spec.parameters}


def test_what_is_recorded_is_the_yaml_and_the_command(monkeypatch):
    monkeypatch.setattr(mergekit_process, "_version", lambda python: "0.1.5")
    tool = load_attacks().get("mergekit_sce").tool
    told = tool.told(["release", "b"], [0.5, 0.5], {"select_topk": 0.2})
    first, *_, last = told.splitlines()
    assert first == "# mergekit-pytorch this.yaml merged --random-seed 0"
    assert last == "# then: base + 0.5 * (merged - base)"
    assert yaml.safe_load(told) == {
        "merge_method": "sce",
        "models": [{"model": "release"}, {"model": "b"}],
        "base_model": "base",
        "parameters": {"select_topk": 0.2},
    }
    seeded = (
        load_attacks()
        .get("mergekit_dare_ties")
        .tool.told(["r"], [1.0], {"density": 0.5, "seed": 3.0})
    )
    assert "--random-seed 3\n" in seeded
    assert "then" not in seeded


def test_coefficients_reach_each_kind_of_method():
    both = ["r", "b"]
    ties, factor = configuration("ties", both, [0.5, 2.0], {"density": 0.2})
    assert [m["parameters"]["weight"] for m in ties["models"]] == [0.25, 1.0]
    assert (ties["parameters"], factor) == ({"density": 0.2, "lambda": 2.0}, 1.0)
    linear, _ = configuration("linear", both, [0.5, 0.8], {})
    assert [m["parameters"]["weight"] for m in linear["models"]] == [0.5, 0.8, -0.3]
    assert "base_model" not in linear
    slerp, _ = configuration("slerp", both, [0.7, 0.3], {})
    assert (slerp["base_model"], slerp["parameters"]) == ("r", {"t": 0.3})
    multislerp, factor = configuration("multislerp", both, [0.5, 2.0], {})
    assert [m["parameters"]["weight"] for m in multislerp["models"]] == [0.25, 1.0]
    assert factor == 2.0
    none, factor = configuration("ties", both, [0.0, 0.0], {"density": 0.2})
    assert (none["parameters"]["lambda"], none["models"][0]["parameters"]["weight"]) == (0.0, 1.0)
    with pytest.raises(
        UserError, match=r"mergekit's karcher takes no weights, but got the coefficients \(0.5, 1.0"
    ):
        configuration("karcher", both, [0.5, 1.0], {})


def test_an_interpreter_that_is_not_there_is_named(monkeypatch, world, tmp_path):
    monkeypatch.setenv("TRAP2_MERGEKIT", str(tmp_path / "python"))
    with pytest.raises(
        UserError, match=r"TRAP2_MERGEKIT=.*/python cannot be run: No such file.*; set it to the Py"
    ):
        made("mergekit_ties", world, 1.0, density=0.2)


def test_an_interpreter_without_mergekit_is_named(monkeypatch, world, tmp_path):
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(fake.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("TRAP2_MERGEKIT", str(fake))
    with pytest.raises(
        UserError, match=r"python has no mergekit; pip install mergekit into an .* or leave the att"
    ):
        made("mergekit_ties", world, 1.0, density=0.2)
