"""Gradients judged when a pass has ended, as they arrive, or on their way come out the same."""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainees import DECOY, OFF, llama, lora, move, ragged, stacked
from trap2.protecting import keeping
from trap2.protecting.cap import Cap
from trap2.protecting.guard import Guard
from trap2.protecting.keeping import Keeper
from trap2.protecting.protector import Protector

PARTS = [stacked(ragged()[:2]), stacked(ragged()[2:])]


def trained(make: Callable[[], nn.Module], config: Any, **more: Any) -> tuple[Protector, Any]:
    """The protector and the gradients by name, None for none, after a step of two batches."""
    model = make()
    protector = Protector(model, config, accumulation_steps=2, **more)
    move(model)
    for part in PARTS:
        protector.backward(part)
    return protector, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def looked_up() -> nn.Module:
    """A model whose embedding hands over sparse gradients."""
    model = llama()
    model.model.embed_tokens.sparse = True
    return model


@pytest.mark.parametrize("cap", [0.0, 0.5])
@pytest.mark.parametrize("little", [0.0, 1.0])
def test_sparse_gradients_come_to_what_dense_ones_do(
    cap: float, little: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "LITTLE", little)
    config = replace(DECOY, cap=cap, strength=3.0)
    (_, found), (_, expected) = trained(looked_up, config), trained(llama, config)
    assert found["model.embed_tokens.weight"].is_sparse is (little == 0.0)
    for name, gradient in found.items():
        dense = gradient.to_dense() if gradient.is_sparse else gradient
        torch.testing.assert_close(dense, expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("make", [llama, lora])
@pytest.mark.parametrize("cap", [0.0, 0.5])
@pytest.mark.parametrize("passes", [1, 2])
def test_all_ways_give_the_same(
    make: Callable[[], nn.Module], cap: float, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(DECOY, cap=cap, scales_per_step=passes, strength=3.0)
    found = []
    for little, processes in ((1.0, 1), (0.0, 1), (0.0, 2)):
        monkeypatch.setattr(keeping, "LITTLE", little)
        monkeypatch.setattr(keeping, "processes", lambda count=processes: count)
        found.append(trained(make, config))
        assert found[-1][0]._keeper._apart is (little == 1.0)
    (apart, expected), *others = found
    assert apart.last is not None
    for other, gradients in others:
        assert other.last is not None
        assert other.last.trap == apart.last.trap
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            # A tensor with two uses, as tied embeddings are, hands its gradient over in parts.
            torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-8)
        assert (other.last.pressure is None) is (apart.last.pressure is None) is (cap == 0.0)
        if other.last.pressure and apart.last.pressure:
            assert asdict(other.last.pressure) == pytest.approx(asdict(apart.last.pressure))


def test_an_adapter_is_kept_apart_and_a_whole_model_is_not() -> None:
    whole = nn.Sequential(nn.Linear(50, 50), nn.Linear(50, 50))
    keeper = Keeper(whole, Cap(whole, 1.0), Guard(whole, has_scaler=False))
    assert not keeper._apart
    for parameter in whole.parameters():
        parameter.requires_grad = parameter.dim() == 1
    keeper = Keeper(whole, Cap(whole, 1.0), Guard(whole, has_scaler=False))
    assert keeper._apart


def test_nothing_is_kept_apart_from_what_reduces_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(keeping, "LITTLE", 1.0)
    model = llama()
    keeper = Keeper(model, Cap(model, 1.0), Guard(model, has_scaler=False))
    assert keeper._apart
    monkeypatch.setattr(keeping, "processes", lambda: 2)
    assert not keeper._apart


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("passes", [1, 2])
def test_a_pass_that_fails_leaves_what_was_there(passes: int) -> None:
    """The nominal gradient, and the user's own before it."""
    calls: list[int] = []

    def backward(loss: Tensor) -> None:
        calls.append(1)
        if len(calls) > passes:
            raise KeyboardInterrupt
        loss.backward()

    model = lora()
    config = replace(DECOY, scales_per_step=2)
    protector = Protector(model, config, backward=backward)
    move(model)
    mine = {n: torch.ones_like(p) for n, p in model.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        parameter.grad = mine.get(name)
    with pytest.raises(KeyboardInterrupt):
        protector.backward(PARTS[0])
    plain = lora()
    move(plain)
    Protector(plain, OFF).backward(PARTS[0])
    nominal = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    left = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    same = [torch.allclose(left[n], nominal[n] + 1.0, rtol=1e-5, atol=1e-6) for n in nominal]
    assert all(same) is (passes == 1)  # the second time a trap's gradient is there too


@pytest.mark.usefixtures("way")
def test_a_nominal_pass_that_fails_leaves_what_was_there() -> None:
    def backward(loss: Tensor) -> None:
        raise KeyboardInterrupt

    model = lora()
    protector = Protector(model, DECOY, backward=backward)
    parameter = next(p for p in model.parameters() if p.requires_grad)
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(KeyboardInterrupt):
        protector.backward(PARTS[0])
    assert torch.equal(parameter.grad, torch.ones_like(parameter))
    assert all(p.grad is None for p in model.parameters() if p is not parameter)
