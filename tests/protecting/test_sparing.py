"""The trap leaves the lower tensors to the task, whichever way its gradients take."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainees import DECOY, OFF, llama, lora, move, ragged, stacked
from trap2.protecting import keeping, sparing
from trap2.protecting.protector import Protector

STRONG = replace(DECOY, strength=3.0, cap=0.5)


def gradients(make: Callable[[], nn.Module], config: Any) -> list[Tensor]:
    """Of the trained tensors, from the input on, after one step."""
    model = make()
    protector = Protector(model, config)
    move(model)
    protector.backward(stacked(ragged()))
    assert all(p.requires_grad for p in protector._keeper._trained)
    return [p.grad for p in protector._keeper._trained if p.grad is not None]


@pytest.fixture(params=["apart", "arriving", "passing"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How gradients of the trap come to lie in `.grad`; passing, a process group is there."""
    grouped = request.param == "passing"
    monkeypatch.setattr(keeping, "LITTLE", float(request.param == "apart"))
    monkeypatch.setattr(keeping, "processes", lambda: 1 + grouped)
    group = SimpleNamespace(is_available=lambda: True, is_initialized=lambda: grouped)
    monkeypatch.setattr(sparing, "dist", group)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_lower_tensors_get_the_task_alone_and_upper_ones_all_of_the_trap(share: float) -> None:
    found = gradients(llama, replace(STRONG, spare=share))
    trapped, plain = (gradients(llama, replace(c, spare=0.0)) for c in (STRONG, OFF))
    assert len(found) == len(trapped) == len(plain)
    low = int(share * len(found))
    assert 0 < low < len(found)
    for place, gradient in enumerate(found):
        expected = plain[place] if place < low else trapped[place]
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)
    assert not any(map(torch.allclose, found[low:], plain[low:]))


@pytest.mark.usefixtures("way")
def test_an_adapter_spares_none() -> None:
    found, whole = (gradients(lora, replace(STRONG, spare=share)) for share in (0.9, 0.0))
    assert len(found) == len(whole)
    assert all(map(torch.equal, found, whole))


def test_the_pass_ends_where_what_it_trains_ends() -> None:
    """Of the first decoder layer, which ends before the spared share, nothing is trained."""
    model = llama()
    protector = Protector(model, replace(DECOY, spare=0.6))
    move(model)
    layers: Any = model.get_submodule("model.layers")
    seen: list[int] = []
    for place, layer in enumerate(layers):
        layer.mlp.register_full_backward_hook(lambda *_, place=place: seen.append(place))
    protector.backward(stacked(ragged()))
    assert seen == [1, 0, 1]  # the nominal pass, then the trap's


def test_what_fails_inside_leaves_everything_trained() -> None:
    model = llama()
    low = [*model.parameters()][:5]
    seen = []

    def fail() -> None:
        with sparing.sparing(low):
            seen.extend(p.requires_grad for p in low)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not any(seen)
    assert all(p.requires_grad for p in model.parameters())
