import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from trap2.errors import UserError
from trap2.protecting.scaled import LiveUpdate


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=24,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


def lora(**changes: object) -> nn.Module:
    settings = {"r": 4, "target_modules": ["query", "value"], **changes}
    return get_peft_model(bert(), LoraConfig(**settings))


class LowRank(nn.Module):
    """The least an adapter can be: y = x W' + x A' B'."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.base = nn.Parameter(torch.randn(rows, columns, dtype=dtype), requires_grad=False)
        self.lora_A = nn.ParameterDict({"default": torch.randn(2, columns, dtype=dtype)})
        self.lora_B = nn.ParameterDict({"default": torch.randn(rows, 2, dtype=dtype)})

    def weight(self) -> torch.Tensor:
        return self.base + self.lora_B["default"] @ self.lora_A["default"]


DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])
SCALES = st.floats(0.05, 2.0)


@given(st.integers(1, 7), st.integers(1, 7), DTYPES, SCALES, st.integers(0, 10**6))
def test_full_weights_are_the_origin_plus_the_scaled_update(
    rows: int, columns: int, dtype: torch.dtype, s: float, seed: int
) -> None:
    torch.manual_seed(seed)
    model = nn.Linear(columns, rows, dtype=dtype)
    origin = [p.detach().clone() for p in model.parameters()]
    update = LiveUpdate(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    trained = [p.detach().clone() for p in model.parameters()]
    rounding = 4 * torch.finfo(dtype).eps
    with update.at(s):
        for p, w0, w1 in zip(model.parameters(), origin, trained, strict=True):
            exact = w0.double() + s * (w1.double() - w0.double())
            size = w0.double().abs() + w1.double().abs() + exact.abs()
            assert p.dtype == dtype
            assert ((p.double() - exact).abs() <= rounding * size + 1e-30).all()
    for p, w1 in zip(model.parameters(), trained, strict=True):
        assert torch.equal(p, w1)


@given(st.integers(1, 7), st.integers(1, 7), DTYPES, SCALES, st.integers(0, 10**6))
def test_an_adapter_is_scaled_once_and_its_base_not_at_all(
    rows: int, columns: int, dtype: torch.dtype, s: float, seed: int
) -> None:
    torch.manual_seed(seed)
    model = LowRank(rows, columns, dtype)
    update = LiveUpdate(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with update.at(s):
        assert torch.equal(model.lora_A["default"], before["lora_A.default"])
        assert torch.equal(model.base, before["base"])
        assert torch.equal(model.lora_B["default"], before["lora_B.default"] * s)
        if dtype == torch.float64:
            delta = before["lora_B.default"] @ before["lora_A.default"]
            torch.testing.assert_close(model.weight(), before["base"] + s * delta)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@given(SCALES, st.integers(0, 10**6))
def test_gradients_are_those_of_the_update_and_add_to_what_is_there(s: float, seed: int) -> None:
    torch.manual_seed(seed)
    model = LowRank(3, 4, torch.float64)
    b = model.lora_B["default"]
    target = torch.randn(3, 4, dtype=torch.float64)
    delta = (model.base + s * b @ model.lora_A["default"] - target).square().sum()
    expected = torch.autograd.grad(delta, [model.lora_A["default"], b])
    b.grad = torch.full_like(b, 7.0)
    with LiveUpdate(model).at(s) as chain:
        (chain * (model.weight() - target).square().sum()).backward()
    torch.testing.assert_close(model.lora_A["default"].grad, expected[0])
    torch.testing.assert_close(b.grad, expected[1] + 7.0)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_head_that_is_not_scaled_keeps_its_own_gradient(frozen: bool) -> None:
    """Also where it is most of what is trained, and the chain rule is left to the gradients."""
    torch.manual_seed(0)
    body, head = nn.Linear(4, 6).double(), nn.Linear(6, 7 if frozen else 2).double()
    model = nn.Sequential()
    model.add_module("body", body)
    model.add_module("classifier", head)
    body.weight.requires_grad_(not frozen)
    update, s = LiveUpdate(model), 0.3
    assert {item.name for item in update.shared} <= {"body.weight", "body.bias"}
    origin = [item.origin() for item in update.shared]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    x = torch.randn(5, 4, dtype=torch.float64)
    scaled = {
        item.name: w0 + s * (item.parameter - w0)
        for item, w0 in zip(update.shared, origin, strict=True)
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    loss = torch.func.functional_call(model, scaled, (x,)).square().sum()
    expected = torch.autograd.grad(loss, trained)
    with update.at(s) as chain:
        assert chain == (1.0 if frozen else s)
        (chain * model(x).square().sum()).backward()
    for p, gradient in zip(trained, expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)
    assert not any(p._backward_hooks for p in model.parameters())


def test_at_scale_0_the_model_is_the_base_and_only_the_head_has_a_gradient() -> None:
    model = nn.Sequential()
    model.add_module("body", nn.Linear(3, 3))
    model.add_module("classifier", nn.Linear(3, 1))
    update = LiveUpdate(model)
    origin = model.body.weight.detach().clone()
    with torch.no_grad():
        model.body.weight.add_(1.0)
    with update.at(0.0) as chain:
        assert torch.equal(model.body.weight, origin)
        (chain * model(torch.ones(2, 3)).sum()).backward()
    assert not model.body.weight.grad.any()
    assert torch.equal(model.classifier.bias.grad, torch.tensor([2.0]))


def test_a_backward_pass_after_leaving_raises() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with LiveUpdate(model).at(0.3):
        loss = model(torch.ones(2, 3)).square().sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_backward_pass_of_before_raises_inside() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    update = LiveUpdate(model)
    loss = model(torch.ones(2, 3)).square().sum()
    with (
        pytest.raises(RuntimeError, match="modified by an inplace operation"),
        update.at(0.3),
    ):
        loss.backward()


def test_an_error_inside_leaves_weights_and_hooks_as_they_were() -> None:
    model = nn.Linear(3, 3)
    update = LiveUpdate(model)
    with torch.no_grad():
        model.weight.add_(1.0)
    before = model.weight.detach().clone()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), update.at(0.3):
        model(torch.ones(3, 7))
    assert torch.equal(model.weight, before)
    assert not any(p._backward_hooks for p in model.parameters())


def test_what_a_merge_would_scale_is_shared_and_heads_are_not() -> None:
    names = {item.name for item in LiveUpdate(bert()).shared}
    assert "bert.encoder.layer.0.attention.self.query.weight" in names
    assert not any(name.startswith("classifier") for name in names)
    adapter = lora(modules_to_save=["classifier", "pooler"])
    shared = LiveUpdate(adapter).shared
    factors = [item for item in shared if "lora_B" in item.name]
    assert len(factors) == 4
    assert all(item.origin is None for item in factors)
    assert not any("lora_A" in item.name or "classifier" in item.name for item in shared)
    pooler = [item for item in shared if "pooler" in item.name]
    assert len(pooler) == 2
    assert all(item.origin is not None for item in pooler)
    assert len(shared) == 6


def test_embedding_adapters_are_part_of_the_update() -> None:
    names = [item.name for item in LiveUpdate(lora(target_modules=["word_embeddings"])).shared]
    assert [name.split(".")[-2] for name in names] == ["lora_embedding_B"]


def test_a_frozen_model_is_refused() -> None:
    with pytest.raises(UserError, match="0 trainable parameters; unfreeze it or add an adapter"):
        LiveUpdate(bert().requires_grad_(False))


def test_a_model_of_which_only_the_head_is_trained_is_refused() -> None:
    wording = r"only head parameters are trainable \(.*classifier.*\); .*: unfreeze the encoder"
    plain = bert()
    plain.bert.requires_grad_(False)
    with pytest.raises(UserError, match=wording):
        LiveUpdate(plain)
    adapter = lora(modules_to_save=["classifier"])
    for name, parameter in adapter.named_parameters():
        parameter.requires_grad = "modules_to_save" in name
    with pytest.raises(UserError, match=wording):
        LiveUpdate(adapter)


def test_batch_norm_statistics_rest_and_then_move_again() -> None:
    layer = nn.BatchNorm1d(3)
    model = nn.Sequential(nn.Linear(3, 3), layer, nn.BatchNorm1d(3, track_running_stats=False))
    x = torch.randn(8, 3)
    update = LiveUpdate(model)
    expected = model(x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with update.frozen_statistics():
        assert torch.equal(model(x), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model(x)
    assert layer.num_batches_tracked == before["1.num_batches_tracked"] + 1
    assert not torch.equal(layer.running_mean, before["1.running_mean"])
    assert [m.track_running_stats for m in model[1:]] == [True, False]
    layer.eval()
    evaluated = layer(x)
    with update.frozen_statistics():
        assert torch.equal(layer(x), evaluated)


def test_rows_are_tied_where_a_layer_normalises_by_the_batch() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    assert LiveUpdate(model).ties_rows
    assert not LiveUpdate(model.eval()).ties_rows
    model.append(nn.BatchNorm1d(3, track_running_stats=False))
    assert LiveUpdate(model.eval()).ties_rows
    assert not LiveUpdate(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))).ties_rows


@pytest.mark.parametrize("kind", [bert, lora])
def test_scaled_values_take_the_same_memory_in_every_pass(kind):
    model = kind()
    update = LiveUpdate(model)
    own = [item.parameter.data_ptr() for item in update.shared]
    used = []
    for s in (0.5, 1.3):
        with update.at(s):
            used.append([item.parameter.data_ptr() for item in update.shared])
    assert used[0] == used[1]
    assert not {*used[0]} & {*own}
    assert [item.parameter.data_ptr() for item in update.shared] == own


def test_a_scale_inside_another_is_its_own_and_leaves_the_other():
    model = nn.Linear(3, 2)
    update = LiveUpdate(model)
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    with update.at(0.5):
        outer = model.weight.detach().clone()
        assert torch.allclose(outer, start + 0.5)
        with update.at(0.5):  # of the model as it stands
            assert torch.allclose(model.weight, start + 0.25)
        assert torch.equal(model.weight, outer)
    assert torch.allclose(model.weight, start + 1.0)
