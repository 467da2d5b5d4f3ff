"""Two processes that talk through gloo reach the weights of one."""

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import torchrun_protected as script
from trainees import llama, lora
from trap2.errors import TrainingStopped
from trap2.protecting.agreement import EVERY, Agreement
from trap2.protecting.config import Trap2Config


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.run(
        [*command, script.__file__, str(folder)], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def facts(done: Path) -> list[dict[str, Any]]:
    return [ast.literal_eval((done / f"facts {rank}.txt").read_text()) for rank in (0, 1)]


def one_process(name: str, folder: Path) -> dict[str, Tensor]:
    if name == "trainer":
        return script.trained(script.with_trainer(folder))
    settings = script.ADAPTERS.get(name.split()[-1], {})
    model = llama() if name in IN_FULL else script.moved(lora(**settings))
    config = script.SPARING if name.endswith("spared") else script.CONFIG
    script.loop(model, config, micro=2 if name.endswith("2") else 1)
    return script.trained(model)


IN_FULL = ["ddp spared", "fsdp", "fsdp kept", "fsdp spared"]
PLACES = ["trainer", "ddp 1", "ddp 2", "fsdp 2", "fsdp lora", *IN_FULL]
HOOKED = ["ddp dora", "ddp pissa", "fsdp dora", "fsdp pissa"]


@pytest.mark.parametrize("name", PLACES + HOOKED)
def test_two_processes_reach_the_weights_of_one(name: str, done: Path, tmp_path: Path) -> None:
    first, second = (load_file(done / f"{name} {rank}.safetensors") for rank in (0, 1))
    alone = one_process(name, tmp_path)
    assert first.keys() == alone.keys()
    for key, value in alone.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, rtol=1e-4, atol=1e-6)


def test_gradients_are_reduced_once_a_micro_batch(facts: list[dict[str, Any]]) -> None:
    """Two or three passes each; all of this pico model fits into one bucket."""
    for fact in facts:
        assert fact["reductions 1"] == fact["reductions of two scales"] == script.STEPS
        assert fact["reductions 2"] == 2 * script.STEPS


def test_a_wrong_scale_on_one_process_stops_both(facts: list[dict[str, Any]]) -> None:
    for rank, fact in enumerate(facts):
        config = script.wrong(rank)
        scales = config.law_at(0).draw(rank, 0, config.scales_per_step)
        assert fact["wrong"] == (
            "processes [1] are not at the step, scales and settings of process 0 (here: step 0, "
            f"scales {scales}); training stopped before the weights took it: give every process "
            "the same Trap2Config and resume them from the same checkpoint"
        )


def test_a_trap_dropped_on_one_process_leaves_the_weights_equal_and_finite(
    done: Path, facts: list[dict[str, Any]]
) -> None:
    assert [fact["dropped"] for fact in facts] == [0, script.STEPS]
    first, second = (load_file(done / f"dropped {rank}.safetensors") for rank in (0, 1))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        assert value.isfinite().all(), name


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_broken_trap_of_sharded_weights_stops_every_process(
    what: str, facts: list[dict[str, Any]]
) -> None:
    for fact in facts:
        assert fact[f"broken {what} of shards"] == (
            "the trap's loss or gradient is not finite and gradients of sharded parameters cannot "
            "be held back; training stopped before the weights took it: lower the learning rate or "
            "the strength"
        )


def test_processes_ease_the_trap_alike(facts: list[dict[str, Any]]) -> None:
    alone = script.eased(0, 1)  # both processes' losses in one
    assert facts[0]["eased"] == facts[1]["eased"] == alone
    assert min(alone) < 1.0
    assert min(script.eased(0)) == 1.0


def test_gathered_parameters_never_hide_the_scaled_shards(facts: list[dict[str, Any]]) -> None:
    for fact in facts:
        before, scaled, after = fact["stale"]
        assert before == after
        assert abs(scaled - before) > 1e-3


def test_sharded_gradients_must_be_reduced_in_every_pass(facts: list[dict[str, Any]]) -> None:
    for fact in facts:
        assert fact["unreduced"].startswith("no sharded parameter has a gradient after backward; ")
        assert fact["unreduced"].endswith(
            "leave set_requires_gradient_sync at True while accumulating"
        )


def test_processes_compare_first_and_then_now_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def other_process(found: list[Tensor], own: Tensor) -> None:
        asked.append(1)
        found[0].copy_(own)
        found[1].copy_(own + (len(asked) == 3))

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather", other_process)
    off = Agreement(Trap2Config(strength=0.0))
    off.check(0, torch.device("cpu"))
    assert asked == []
    agreement = Agreement(Trap2Config())
    for step in range(2 * EVERY):
        agreement.check(step, torch.device("cpu"))
    assert len(asked) == 2
    with pytest.raises(TrainingStopped, match=rf"processes \[1\] .*here: step {2 * EVERY}, scales"):
        agreement.check(2 * EVERY, torch.device("cpu"))
