"""The live model: exact restoring, refusals, and that every attack reproduces one model alone."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trap2.attacks.attack import load_attacks, merge
from trap2.attacks.live import LiveModel
from trap2.errors import Trap2Error, UserError
from trap2.update import Update

QUICK = settings(deadline=None, max_examples=30)

NEUTRAL = {"density": 1.0, "drop": 0.0, "seed": 0, "epsilon": 0.0, "gamma": 0.0}
NEUTRAL |= {"rank_share": 0.1, "weight": 1.0, "rank_kept": 1.0, "bits": 24, "noise": 0.0}
NEUTRAL |= {"rank_share": 0.1, "weight": 1.0, "scale": 1.0, "first": 1.0, "early": 1.0, "late": 1.0}
NEUTRAL |= {"strictness": 0.5, "votes": 2, "pull": 0.03}
"""Hyper-parameters at which an attack leaves a single model alone."""

CHANGES_ONE = ("iso_c", "iso_cts", "pcb")
"""Attacks that by definition change a single model whatever their hyper-parameters are."""

ENTRIES = [load_attacks().get(name) for name in load_attacks()]
NAMES = [entry.name for entry in ENTRIES if not entry.needs_data and entry.tool is None]
"""Our own attacks on weights alone; those on rows and of other libraries are tested elsewhere."""

TOKENS = torch.tensor([[1, 5, 9, 2], [1, 7, 3, 2]])


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(model, before):
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def pico_config():
    from transformers import BertConfig

    return BertConfig(
        vocab_size=16,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=8,
        num_labels=3,
        initializer_range=0.5,
    )


@pytest.fixture(scope="module")
def pico(tmp_path_factory):
    """A base encoder, a LoRA and a full release of it with a head, and the logits of each."""
    from peft import LoraConfig, get_peft_model
    from transformers import BertForSequenceClassification, BertModel

    folder = tmp_path_factory.mktemp("pico")
    torch.manual_seed(0)
    BertModel(pico_config()).save_pretrained(folder / "base")

    def fresh():
        torch.manual_seed(1)
        return BertForSequenceClassification.from_pretrained(folder / "base", num_labels=3).eval()

    full = fresh()
    for parameter in full.bert.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    full.save_pretrained(folder / "full")

    config = LoraConfig(
        r=2, lora_alpha=8, target_modules=["query", "value"], init_lora_weights=False
    )
    lora = get_peft_model(fresh(), config).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora.save_pretrained(folder / "lora")
    with torch.no_grad():
        logits = {"full": full(TOKENS).logits, "lora": lora(TOKENS).logits}
    updates = {kind: Update.open(folder / kind, folder / "base") for kind in ("full", "lora")}
    return updates, logits, fresh()


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", [n for n in NAMES if n not in CHANGES_ONE])
def test_one_model_alone_keeps_its_logits(pico, name, kind):
    updates, logits, model = pico
    chosen = load_attacks().get(name)
    live = LiveModel(model, updates[kind].base)
    before = snapshot(model)
    params = {key: NEUTRAL[key] for key in chosen.grid}
    other = updates["lora" if kind == "full" else "full"]
    cases = [([updates[kind]], 1.0)]
    if chosen.models == (2, 2):
        cases = [([updates[kind], other], 0.0), ([other, updates[kind]], 1.0)]
    for models, coefficient in cases:
        with live.merged(merge(name, models, coefficient, **params)) as merged, torch.no_grad():
            out = merged(TOKENS).logits
        torch.testing.assert_close(out, logits[kind], rtol=1e-5, atol=1e-5)
        assert_same(model, before)
    with torch.no_grad():
        assert not torch.allclose(model(TOKENS).logits, logits[kind], atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_every_attack_merges_real_releases_and_leaves_nothing_behind(pico, name):
    updates, _, model = pico
    chosen = load_attacks().get(name)
    before = snapshot(model)
    params = next(chosen.settings())
    both = [updates["lora"], updates["full"]]
    live = LiveModel(model, updates["lora"].base)
    with live.merged(merge(name, both, 0.5, **params)) as merged, torch.no_grad():
        out = merged(TOKENS).logits
    assert torch.isfinite(out).all()
    assert_same(model, before)


def test_only_what_the_updates_share_is_touched(pico):
    updates, _, model = pico
    live = LiveModel(model, updates["lora"].base)
    before = snapshot(model)
    with live.merged(merge("task_arithmetic", [updates["lora"]], 1.0)):
        changed = [n for n, v in model.state_dict().items() if not torch.equal(v, before[n])]
    shared = [f"bert.{name}" for name in updates["lora"].shared]
    assert sorted(changed) == sorted(shared)
    assert set(updates["full"].shared) <= set(live.names)


def test_mixed_releases_merge_and_the_model_is_the_weighted_sum(pico):
    updates, _, model = pico
    live = LiveModel(model, updates["lora"].base)
    both = [updates["lora"], updates["full"]]
    name = "encoder.layer.0.attention.self.query.weight"
    expected = updates["lora"].scaled(name, 0.4) + 0.6 * updates["full"].delta(name)
    with live.merged(merge("task_arithmetic", both, [0.4, 0.6])):
        held = model.state_dict()["bert." + name].clone()
    torch.testing.assert_close(held, expected, rtol=0, atol=1e-6)


@QUICK
@given(
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.integers(0, 99),
)
def test_every_dtype_and_shape_is_restored_to_the_bit(dtype, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Module()
    model.w = nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
    base = {"w": model.w.detach().clone()}
    before, delta = model.w.detach().clone(), torch.randn(shape, generator=generator)
    live, parameter = LiveModel(model, base), model.w
    with live.merged([("w", delta)]):
        assert model.w is parameter
        wide = torch.promote_types(dtype, torch.float32)
        assert torch.equal(model.w, (before.to(wide) + delta.to(wide)).to(dtype))
    assert torch.equal(model.w, before)
    assert model.w.dtype == dtype


def test_a_low_precision_model_adds_to_the_full_precision_base():
    base = {"w": torch.tensor([1.003])}
    model = nn.Module()
    model.w = nn.Parameter(base["w"].bfloat16())
    with LiveModel(model, base).merged([("w", torch.tensor([0.003]))]):
        assert model.w.float() == torch.tensor([1.006]).bfloat16().float()


def test_buffers_are_merged_and_counters_are_not():
    model = small()
    live = LiveModel(model)
    assert "1.running_mean" in live.names
    assert "1.num_batches_tracked" not in live.names
    before = snapshot(model)
    with live.merged([("1.running_mean", torch.ones(2)), ("0.weight", torch.ones(2, 3))]):
        assert torch.equal(model[1].running_mean, before["1.running_mean"] + 1)
    assert_same(model, before)


def test_an_exception_inside_restores():
    model = small()
    live, before = LiveModel(model), snapshot(model)
    with pytest.raises(KeyError), live.merged([("0.bias", torch.ones(2))]):
        raise KeyError
    assert_same(model, before)
    with live.merged([("0.bias", torch.ones(2))]):
        pass
    assert_same(model, before)


@pytest.mark.parametrize(
    ("deltas", "message"),
    [
        ([("0.wieght", torch.ones(2, 3))], "changes '0.wieght', .* did you mean '0.weight'"),
        ([("1.num_batches_tracked", torch.ones(()))], "no floating-point base tensor of the model"),
        ([("0.weight", torch.ones(3, 2))], r"has shape \(3, 2\), but the model has \(2, 3\); use"),
        ([("0.bias", torch.ones(2))] * 2, "gives '0.bias' twice; give every tensor once"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_stays(deltas, message):
    model = small()
    live, before = LiveModel(model), snapshot(model)
    good = ("1.weight", torch.ones(2))
    with pytest.raises(UserError, match=message), live.merged([good, *deltas]):
        pytest.fail("the block ran")
    assert_same(model, before)


def test_missing_tensors_are_refused():
    model = small()
    live, before = LiveModel(model), snapshot(model)
    message = "lacks 1 of 2 expected tensors, such as '0.weight'; the rest would silently stay"
    deltas = [("0.bias", torch.ones(2))]
    expected = ["0.weight", "0.bias"]
    with pytest.raises(UserError, match=message), live.merged(deltas, expected=expected):
        pytest.fail("the block ran")
    assert_same(model, before)


def test_a_merge_that_leaves_a_tensor_out_never_runs():
    model = small()
    live, before = LiveModel(model), snapshot(model)
    update = {"0.bias": torch.ones(2), "0.weight": torch.full((2, 3), float("inf"))}
    stream = merge("task_arithmetic", [update], 1.0)
    with pytest.raises(Trap2Error, match="gave NaN or infinity"), live.merged(stream):
        pytest.fail("the block ran")
    assert_same(model, before)


def test_nesting_is_refused_and_the_outer_merge_stays():
    model = small()
    live, before = LiveModel(model), snapshot(model)
    with live.merged([("0.bias", torch.ones(2))]):
        again = live.merged([])
        with pytest.raises(Trap2Error, match="holds a merge already; leave its"), again:
            pytest.fail("the block ran")
        assert torch.equal(model[0].bias, before["0.bias"] + 1)
    assert_same(model, before)


def tied():
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    model["b"].weight = model["a"].weight
    return model


def test_tied_tensors_are_changed_once():
    model = tied()
    live, before = LiveModel(model), snapshot(model)
    one = torch.ones(2, 2)
    for deltas in ([("a.weight", one)], [("a.weight", one), ("b.weight", one)]):
        with live.merged(deltas):
            assert torch.equal(model["b"].weight, before["a.weight"] + 1)
        assert_same(model, before)


def test_tied_tensors_that_disagree_are_refused():
    model = tied()
    live, before = LiveModel(model), snapshot(model)
    deltas = [("a.weight", torch.ones(2, 2)), ("b.weight", torch.zeros(2, 2))]
    message = "'b.weight' is tied to another tensor that the merge changes differently"
    with pytest.raises(UserError, match=message), live.merged(deltas):
        pytest.fail("the block ran")
    assert_same(model, before)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({"x": torch.ones(1)}, "shares no tensor with the base; give the base's own model"),
        ({"0.bias": torch.ones(5)}, r"'0.bias' has shape \(2,\) in the model, but \(5,\) in the"),
        ({"0.bias": torch.ones(2)}, "'0.bias' of the model differs from the base; load the base"),
    ],
)
def test_a_model_of_another_base_is_refused(base, message):
    with pytest.raises(UserError, match=message):
        LiveModel(small(), base)


def test_autocast_does_not_keep_the_weights_of_before():
    model = nn.Linear(4, 4, bias=False)
    live, x = LiveModel(model), torch.ones(1, 4)
    with torch.autocast("cpu", torch.bfloat16):
        before = model(x)
        with live.merged([("weight", -model.weight.detach().clone())]):
            assert not model(x).any()
        assert torch.equal(model(x), before)
