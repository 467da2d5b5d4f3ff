"""Hand-written loops of every kind: Accelerate, mixed precision, checkpointing, compilation."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import trainees
from trainees import DECOY, OFF, distance, gradients, llama, lora, move, ragged, stacked
from trap2.errors import UserError
from trap2.protecting.config import Trap2Config
from trap2.protecting.losses import Outcome
from trap2.protecting.protector import Protector, default_forward
from trap2.protecting.trainer import protect_trainer


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)


def batches(count: int = 6, rows: int = 4) -> list[dict[str, Tensor]]:
    data = ragged(count * rows)
    return [stacked(data[i * rows : (i + 1) * rows]) for i in range(count)]


def plain_loop(micro: int, count: int = 6) -> tuple[nn.Module, list[tuple[float, ...]]]:
    """Two lines changed in the loop everybody writes; the oracle of the other loops."""
    model, scales = lora(), []
    protector, optimizer = Protector(model, DECOY, accumulation_steps=micro), optimizer_of(model)
    for i, batch in enumerate(batches(count)):
        protector.backward(batch)
        assert protector.last is not None
        scales.append(protector.last.scales)
        if (i + 1) % micro == 0:
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    return model, scales


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_an_accelerate_loop_is_the_plain_loop(micro: int) -> None:
    """It divides by the accumulation steps itself and says where an optimizer step ends."""
    expected, expected_scales = plain_loop(micro)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=micro)
    model = lora()
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    protector, scales = Protector(model, DECOY, accelerator=accelerator), []
    for batch in batches():
        with accelerator.accumulate(model):
            protector.backward(batch)
            assert protector.last is not None
            scales.append(protector.last.scales)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    assert scales == expected_scales
    assert len(set(scales)) == 6 // micro
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-5, atol=1e-7)


def test_an_epoch_that_ends_in_the_middle_of_a_window_ends_the_step() -> None:
    """Accelerate steps at the end of its loader; the next batch has the next scale."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = lora()
    loader = accelerator.prepare(torch.utils.data.DataLoader(ragged(12), batch_size=4))
    protector, scales = Protector(model, DECOY, accelerator=accelerator), []
    for _ in range(2):
        for batch in loader:
            with accelerator.accumulate(model):
                protector.backward(batch)
            assert protector.last is not None
            scales.append(protector.last.scales[0])
    drawn = [DECOY.law_at(step).draw(0, step)[0] for step in range(4)]
    assert scales == [drawn[0], drawn[0], drawn[1], drawn[2], drawn[2], drawn[3]]
    state = protector.state_dict()
    assert (state["step"], state["micro"], state["memory"]) == (4, 0, {})


@pytest.mark.parametrize("twice", [{"accumulation_steps": 2}, {"backward": lambda loss: None}])
def test_an_accelerator_leaves_nothing_to_say_twice(twice: dict[str, Any]) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(UserError) as caught:
        Protector(lora(), accelerator=Accelerator(cpu=True), **twice)
    assert str(caught.value) == (
        "an accelerator back-propagates and divides by its own gradient_accumulation_steps=1; "
        "leave out backward and accumulation_steps"
    )


def in_half(dtype: torch.dtype) -> Callable[[nn.Module, Mapping[str, Any]], Outcome]:
    def forward(model: nn.Module, batch: Mapping[str, Any]) -> Outcome:
        with torch.autocast("cpu", dtype):
            return default_forward(model, batch)

    return forward


@pytest.mark.parametrize("make", [llama, lora])
@pytest.mark.parametrize(("dtype", "noise"), [(torch.float16, 0.02), (torch.bfloat16, 0.2)])
def test_half_precision_with_a_gradient_scaler(
    make: Callable[[], nn.Module], dtype: torch.dtype, noise: float
) -> None:
    """The unscaled gradient of both passes is that of full precision, up to rounding."""

    def run(scaler: Any, **more: Any) -> Tensor:
        model = make()
        protector, optimizer = Protector(model, DECOY, **more), optimizer_of(model)
        move(model)
        protector.backward(batches(1)[0])
        if scaler is not None:
            scaler.unscale_(optimizer)
        return gradients(model)

    exact = run(None)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    half = run(scaler, forward=in_half(dtype), backward=lambda loss: scaler.scale(loss).backward())
    assert distance(half, exact) < noise


@pytest.mark.parametrize("make", [llama, lora])
def test_accelerates_own_autocast_is_the_loops(make: Callable[[], nn.Module]) -> None:
    """It wraps the model's forward; its cache must not hide the scaled weights."""

    def run(accelerated: bool) -> Tensor:
        model, more = make(), {}
        called = model
        if accelerated:
            AcceleratorState._reset_state(reset_partial_state=True)
            more["accelerator"] = Accelerator(cpu=True, mixed_precision="bf16")
            called = more["accelerator"].prepare(model)
        else:
            more["forward"] = in_half(torch.bfloat16)
        protector = Protector(called, DECOY, **more)
        move(model)
        protector.backward(batches(1)[0])
        return gradients(model)

    assert distance(run(True), run(False)) < 1e-6


def test_an_overflow_skips_the_step_and_lowers_the_scale() -> None:
    model = lora()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    protector = Protector(
        model,
        DECOY,
        forward=in_half(torch.float16),
        backward=lambda loss: scaler.scale(loss).backward(),
    )
    optimizer, before = optimizer_of(model), trainees.weights(model)
    protector.backward(batches(1)[0])
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**39
    assert all(torch.equal(value, before[name]) for name, value in trainees.weights(model).items())


@pytest.mark.parametrize("make", [llama, lora])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("half", [True, False])
def test_checkpointing_changes_no_gradient(
    make: Callable[[], nn.Module], reentrant: bool, half: bool
) -> None:
    def run(checkpointing: bool) -> Tensor:
        model = make()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        forward = in_half(torch.bfloat16) if half else default_forward
        protector = Protector(model, DECOY, forward=forward)
        move(model)
        protector.backward(batches(1)[0])
        return gradients(model)

    assert distance(run(True), run(False)) < 1e-5


def test_a_compiled_model_gives_the_gradients_of_an_eager_one() -> None:
    """Also when it was compiled and run before it is protected, and at ever new scales."""

    def run(compiled: bool) -> list[Tensor]:
        model = lora()
        if compiled:
            called = torch.compile(model, backend="aot_eager")
            called(**batches(1)[0])
        protector = Protector(called if compiled else model, DECOY)
        move(model)
        found = []
        for batch in batches(4):
            protector.backward(batch)
            found.append(gradients(model).clone())
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
            model.zero_grad()
        return found

    graphs: list[int] = []

    torch._dynamo.reset()
    for compiled, eager in zip(run(True), run(False), strict=True):
        assert distance(compiled, eager) < 1e-5
    first, *later = graphs[:4]
    assert first > 0
    assert later == [first] * 3, "a new scale compiles nothing"


def test_a_compiling_trainer_is_protected(tmp_path: Path) -> None:
    def run(**changes: Any) -> Tensor:
        model, seen = llama(), trainees.Gradients()
        trainer = protect_trainer(Trainer)(
            model=model,
            args=TrainingArguments(**trainees.settings(tmp_path, **changes)),
            train_dataset=ragged(),
            trap2=DECOY,
            callbacks=[seen],
        )
        move(model)
        trainer.train()
        assert seen.seen is not None
        return seen.seen

    torch._dynamo.reset()
    compiled = run(torch_compile=True, torch_compile_backend="aot_eager")
    assert distance(compiled, run()) < 1e-5


@pytest.mark.parametrize("trap2", [DECOY, OFF])
def test_gradients_are_clipped_once(trap2: Trap2Config, tmp_path: Path) -> None:
    """The sum of nominal and trap gradient has the norm asked for, or less."""
    model, seen = lora(), trainees.Gradients()
    trainer = protect_trainer(Trainer)(
        model=model,
        args=TrainingArguments(**trainees.settings(tmp_path, max_grad_norm=0.01)),
        train_dataset=ragged(),
        trap2=trap2,
        callbacks=[seen],
    )
    move(model)
    trainer.train()
    assert seen.seen is not None
    assert seen.seen.norm().item() == pytest.approx(0.01, rel=1e-3)
