"""Sparse gradients of a trap pass: the same sums, and only where they are safe."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from trainees import DECOY, llama, lora, move, ragged, stacked
from trap2.protecting import scaled
from trap2.protecting.lookups import sparse_lookups
from trap2.protecting.protector import Protector

BATCH = stacked(ragged())


def gradients(make: Callable[[], nn.Module], cap: float) -> tuple[dict[str, torch.Tensor], bool]:
    """Gradients by name after one step in float64, and whether any that arrived was sparse."""
    model = make().double()
    protector = Protector(model, replace(DECOY, cap=cap))
    move(model)
    kinds = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda grad: kinds.append(grad.is_sparse))
    protector.backward(BATCH)
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, any(kinds)


def tied() -> nn.Module:
    """A model whose head is its embedding."""
    model = llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


@pytest.mark.parametrize("make", [llama, tied])
@pytest.mark.parametrize("cap", [0.0, 0.5])
def test_gradients_are_those_of_dense_lookups(
    make: Callable[[], nn.Module], cap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, sparse = gradients(make, cap)
    assert sparse == (make is llama)  # a tied one meets a dense gradient on its way
    monkeypatch.setattr(scaled, "sparse_lookups", lambda model: sparse_lookups(nn.Module()))
    expected, _ = gradients(make, cap)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert not gradient.is_sparse
        # transformers computes a causal model's loss in float32
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)


def looked_up(lookup: nn.Embedding) -> nn.Embedding:
    """With the gradient of a nominal pass."""
    lookup(torch.tensor([1, 2])).sum().backward()
    return lookup


def test_lookups_are_as_before_after_a_failure() -> None:
    lookup = looked_up(nn.Embedding(5, 2))
    with pytest.raises(IndexError), sparse_lookups(lookup):
        lookup(torch.tensor([7]))
    assert not lookup.sparse


class Counted(nn.Embedding):
    """Some other kind of lookup."""


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(nn.Embedding(5, 2), id="without a gradient"),
        pytest.param(looked_up(nn.Embedding(5, 2, scale_grad_by_freq=True)), id="by frequency"),
        pytest.param(looked_up(Counted(5, 2)), id="another class"),
        pytest.param(torch.compile(looked_up(nn.Embedding(5, 2))), id="compiled"),
    ],
)
def test_what_it_leaves_alone(model: nn.Module) -> None:
    with sparse_lookups(model):
        assert not any(getattr(module, "sparse", False) for module in model.modules())


def test_a_model_compiled_in_place_is_left_alone() -> None:
    model = nn.Sequential(looked_up(nn.Embedding(5, 2)))
    model.compile()
    with sparse_lookups(model):
        assert not model[0].sparse


def test_a_lookup_that_is_sparse_anyway_stays_so() -> None:
    lookup = looked_up(nn.Embedding(5, 2, sparse=True))
    with sparse_lookups(lookup):
        assert lookup.sparse
    assert lookup.sparse


def test_a_frozen_embedding_has_nothing_to_hand_over() -> None:
    _, sparse = gradients(lora, 0.5)
    assert not sparse
