"""Adapters scaled by their layers' outputs: checkpointed, compiled, copied, switched off."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from every_adapter import adapted, move
from trainees import DECOY, OFF, distance, gradients, lora, ragged, stacked, weights
from trap2.protecting.protector import Protector
from trap2.protecting.scaled import LiveUpdate

BATCH = stacked(ragged(4))


def dora() -> nn.Module:
    return lora(use_dora=True)


def protected(model: nn.Module, called: nn.Module | None = None, steps: int = 3) -> list[Tensor]:
    """Gradients of steps at ever new scales."""
    protector = Protector(model if called is None else called, DECOY)
    move(model)
    found = []
    for _ in range(steps):
        protector.backward(BATCH)
        found.append(gradients(model).clone())
        model.zero_grad()
    return found


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    checkpointed = dora()
    checkpointed.enable_input_require_grads()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for one, two in zip(protected(checkpointed), protected(dora()), strict=True):
        assert distance(one, two) < 1e-5


@pytest.mark.parametrize("first", [True, False])
def test_a_compiled_model_gives_the_gradients_of_an_eager_one(first: bool) -> None:
    """Also when it was compiled and run before it is protected; no scale is compiled anew."""
    torch._dynamo.reset()
    model = adapted("IA3")
    called = torch.compile(model, backend="aot_eager")
    ids = {"input_ids": BATCH["input_ids"]}
    if first:
        called(**ids)
    update = LiveUpdate(model)
    move(model)
    torch._dynamo.utils.counters.clear()
    for s in (0.3, 0.8, 1.4):
        found = []
        for forward in (called, model):
            model.zero_grad()
            with update.at(s) as chain:
                (chain * forward(**ids).pooler_output.square().sum()).backward()
            found.append(gradients(model).clone())
        assert distance(*found) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_strength_zero_is_bit_for_bit_the_plain_run() -> None:
    plain, control = dora(), dora()
    protector = Protector(control, OFF)
    for _ in range(2):
        plain(**BATCH).loss.backward()
        protector.backward(BATCH)
        for model in (plain, control):
            with torch.no_grad():
                for p in model.parameters():
                    if p.grad is not None:
                        p.sub_(p.grad)
                        p.grad = None
    ours = weights(control)
    assert all(torch.equal(value, ours[name]) for name, value in weights(plain).items())


@pytest.mark.parametrize("name", ["DoRA", "PiSSA"])
def test_a_model_with_hooks_can_be_copied_and_sent(name: str) -> None:
    model = adapted(name)
    update = LiveUpdate(model)
    move(model)
    output = model(BATCH["input_ids"]).pooler_output
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with update.at(0.3):  # the original's scale is not the copy's
            assert torch.equal(other(BATCH["input_ids"]).pooler_output, output)
