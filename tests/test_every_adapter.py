"""Every kind of adapter: its update is what peft merges, and training scales exactly that update.

Symbols: W0 base weight; W1 merged weight; s scale; theta the adapter's parameters; L loss.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from every_adapter import EVERY, adapted, bert, move
from trap2.adapters import MERGED
from trap2.protecting.scaled import LiveUpdate
from trap2.update import Update

SCALES = (0.0, 0.37, 1.0, 1.6)
IDS = torch.randint(1, 24, (3, 7), generator=torch.Generator().manual_seed(3))

SINGLE = ("C3A", "DEFT", "FourierFT", "GraLoRA", "OLoRA", "PiSSA", "RandLoRA")
"""What peft works out in float32 in a float64 model too, if only when it is put on."""

OWN_GRADIENT = ("DoRA", "DoRA on an embedding", "DoRA and a module", "OSF")
"""What peft trains by another gradient than its update's: a norm held constant, a projection."""

NO_GRADIENT = ("C3A",)
"""Whose backward pass in peft is not its forward pass's: 3 % off without any scale."""

State = dict[str, Tensor]


def run(model: nn.Module) -> Tensor:
    output: Any = model(input_ids=IDS)
    pooled: Tensor = output.pooler_output
    return pooled


def loss(model: nn.Module) -> Tensor:
    return (run(model) * torch.linspace(-1, 1, 16, dtype=torch.float64)).sum()


def merged(model: nn.Module) -> State:
    state: State = copy.deepcopy(model).eval().merge_and_unload().state_dict()
    return state


def at_scale(W0: State, W1: State, s: float) -> nn.Module:
    """The oracle: a model of W0 + s * (W1 - W0), without any adapter."""
    model = bert().double()
    model.load_state_dict({n: W0[n] + s * (W1[n] - W0[n]) for n in W0})
    return model


def in_training(name: str) -> tuple[nn.Module, LiveUpdate, State]:
    model = adapted(name).double()
    update = LiveUpdate(model)
    move(model)
    return model, update, bert().double().state_dict()


def test_every_type_that_is_accepted_is_tested() -> None:
    assert {settings["peft_type"] for settings in EVERY.values()} == {*MERGED}


@pytest.mark.parametrize("name", EVERY)
def test_a_release_is_opened_as_peft_merges_it(name: str, tmp_path: Path) -> None:
    base = bert()
    base.save_pretrained(tmp_path / "base")
    model = adapted(name)
    move(model)
    model.save_pretrained(tmp_path / "release")
    oracle = merged(PeftModel.from_pretrained(bert(), tmp_path / "release"))
    stream = torch.get_rng_state()
    update = Update.open(tmp_path / "release", tmp_path / "base")
    assert torch.equal(torch.get_rng_state(), stream)
    for tensor, origin in base.state_dict().items():
        if tensor in update.shared:
            change = oracle[tensor] - origin
            torch.testing.assert_close(update.delta(tensor), change, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(oracle[tensor], origin), tensor


@pytest.mark.parametrize("name", EVERY)
def test_training_scales_what_peft_merges(name: str) -> None:
    model, update, W0 = in_training(name)
    W1, plain = merged(model), run(model)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    size = (plain - run(at_scale(W0, W1, 0.0))).norm()
    assert size > 1e-3
    for s in SCALES:
        with update.at(s):
            live = run(model)
        error = (live - run(at_scale(W0, W1, s))).norm() / size
        assert error < (1e-5 if name in SINGLE else 1e-12)
    assert torch.equal(run(model), plain)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("frozen", ["nothing", "attention", "LayerNorm", "layer.0", "weight"])
def test_full_fine_tuning_is_scaled_whatever_is_frozen(frozen: str) -> None:
    model = bert().double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = frozen not in name
    W0 = {n: t.clone() for n, t in model.state_dict().items()}
    update = LiveUpdate(model)
    move(model)
    W1, s = model.state_dict(), 0.37
    oracle = at_scale(W0, W1, s)
    loss(oracle).backward()
    with update.at(s) as chain:
        (chain * loss(model)).backward()
        torch.testing.assert_close(run(model), run(oracle), rtol=1e-12, atol=1e-12)
    for name, parameter in model.named_parameters():
        expected = oracle.get_parameter(name).grad if parameter.requires_grad else None
        if expected is None:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, s * expected)


@pytest.mark.parametrize("name", [n for n in EVERY if n not in OWN_GRADIENT + NO_GRADIENT])
def test_gradients_are_those_of_the_merged_model(name: str) -> None:
    """Against central differences of L(W0 + s * dW(theta)) along a random direction."""
    model, update, W0 = in_training(name)
    s, step = 0.37, (1e-4 if name in SINGLE else 1e-5)
    trained = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(5)
    way = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in trained]
    with update.at(s) as chain:
        (chain * loss(model)).backward()
    slope = sum(
        (p.grad * v).sum().item() for p, v in zip(trained, way, strict=True) if p.grad is not None
    )
    sides = []
    with torch.no_grad():
        for shift in (step, -2 * step):
            for p, v in zip(trained, way, strict=True):
                p.add_(v, alpha=shift)
            sides.append(loss(at_scale(W0, merged(model), s)).item())
    expected = (sides[0] - sides[1]) / (2 * step)
    assert slope == pytest.approx(expected, rel=1e-2 if name in SINGLE else 1e-6)


@pytest.mark.parametrize("name", OWN_GRADIENT)
def test_an_adapters_own_gradient_is_taken_at_the_scaled_weights(name: str) -> None:
    """dL/dW at W0 + s * dW, led back layer by layer as peft does it at scale 1, and times s."""
    model, update, W0 = in_training(name)
    s = 0.37
    scaled = at_scale(W0, merged(model), s)
    loss(scaled).backward()
    with update.at(s) as chain:
        (chain * loss(model)).backward()
    gradients = {id(p): p.grad for p in model.parameters()}
    for path, layer in model.named_modules():
        if not hasattr(type(layer), "get_base_layer"):
            continue
        weight = scaled.get_submodule(path.removeprefix("base_model.model.")).weight
        own = [p for n, p in layer.named_parameters() if p.requires_grad and "base_layer" not in n]
        model.zero_grad()
        embeds = isinstance(layer.get_base_layer(), nn.Embedding)
        rows, columns = weight.shape
        every = torch.arange(rows) if embeds else torch.eye(columns, dtype=weight.dtype)
        (layer(every) * (weight.grad if embeds else weight.grad.T)).sum().backward()
        for parameter in own:
            torch.testing.assert_close(gradients[id(parameter)], s * parameter.grad)
