"""peft's combination types on released adapters: what they equal, and what they get wrong."""

from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraModel
from torch import nn
from transformers import AutoModel

from trap2.attacks.attack import load_attacks, merge
from trap2.attacks.peft_combinations import COMBINATIONS
from trap2.errors import UserError
from trap2.update import Update

QUERY, VALUE = (f"encoder.layer.0.attention.self.{part}.weight" for part in ("query", "value"))


@pytest.fixture(scope="module")
def release(pico_base, tmp_path_factory):
    """Makes an adapter of the pico base; equal settings are made once."""
    root, made = tmp_path_factory.mktemp("adapters"), {}

    def make(seed: int, **settings: object) -> Update:
        key = repr((seed, settings))
        if key not in made:
            folder: Path = root / str(len(made))
            torch.manual_seed(seed)
            given = {"r": 4, "lora_alpha": 6, "target_modules": ["query", "value"], **settings}
            model = AutoModel.from_pretrained(pico_base)
            adapted = get_peft_model(model, LoraConfig(**given, init_lora_weights=False))
            adapted.save_pretrained(folder)
            made[key] = Update.open(folder, pico_base)
        return made[key]

    return make


def merged(kind, updates, coefficients, **params):
    return dict(merge(f"peft_{kind}", updates, coefficients, **params))


def ours(name, updates, coefficients, **params):
    """Our definition on each tensor by itself, which is how peft trims."""
    found = {}
    for tensor in dict.fromkeys(n for u in updates for n in u.shared):
        parts = [{tensor: u.delta(tensor)} for u in updates if tensor in u.shared]
        kept = [c for u, c in zip(updates, coefficients, strict=True) if tensor in u.shared]
        found |= dict(merge(name, parts, kept, **params))
    return found


def close(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)


def apart(one, other):
    """How far apart two merges are, as a share of the second."""
    gap = sum(float((one[n] - other[n]).norm()) ** 2 for n in other)
    return (gap / sum(float(d.norm()) ** 2 for d in other.values())) ** 0.5


def test_every_type_of_peft_is_an_attack():
    known = get_type_hints(LoraModel.add_weighted_adapter)["combination_type"]
    assert sorted(COMBINATIONS) == sorted(get_args(known))
    for kind in COMBINATIONS:
        entry = load_attacks().get(f"peft_{kind}")
        assert (entry.tool.name, entry.needs) == ("peft", ("peft",))


@pytest.mark.parametrize("kind", COMBINATIONS)
def test_what_peft_itself_gives_on_the_live_model_is_what_we_get(release, pico_base, kind):
    updates = [release(seed) for seed in range(3)]
    params = {key: values[0] for key, values in COMBINATIONS[kind].items()}
    if "seed" in params:
        params["density"] = 1.0  # masks follow the order of the layers, which differs
    found = merged(kind, updates, [0.5, 1.5, 0.7], **params)
    live = AutoModel.from_pretrained(pico_base)
    model = PeftModel.from_pretrained(live, updates[0].folder, adapter_name="a")
    for name, update in zip("bc", updates[1:], strict=True):
        model.load_adapter(update.folder, adapter_name=name)
    density = {"density": params["density"]} if "density" in params else {}
    model.add_weighted_adapter([*"abc"], [0.5, 1.5, 0.7], "m", combination_type=kind, **density)
    theirs = {
        n: model.base_model.model.get_submodule(n.removesuffix(".weight")).get_delta_weight("m")
        for n in found
    }
    assert found.keys() == set(updates[0].shared)
    close(found, theirs)


def test_cat_is_task_arithmetic_whatever_the_adapters_are(release):
    updates = [
        release(0),
        release(1, r=2, lora_alpha=3, target_modules=["value", "word_embeddings"]),
        release(2, r=3, rank_pattern={"query": 1}, alpha_pattern={"query": 9}),
    ]
    coefficients = [0.4, -1.5, 0.9]
    close(
        merged("cat", updates, coefficients), dict(merge("task_arithmetic", updates, coefficients))
    )


def test_svd_is_task_arithmetic_where_the_rank_suffices_and_by_default_it_does_not(release):
    updates, coefficients = [release(0), release(1)], [0.4, -1.5]
    exact = dict(merge("task_arithmetic", updates, coefficients))
    close(merged("svd", updates, coefficients, rank=8), exact)
    cut = merged("svd", updates, coefficients)
    assert int(torch.linalg.matrix_rank(cut[QUERY], rtol=1e-4)) == 4
    assert apart(cut, exact) > 0.2
    U, S, Vh = torch.linalg.svd(exact[QUERY])
    torch.testing.assert_close(cut[QUERY], U[:, :4] @ S[:4].diag() @ Vh[:4], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "own", "density"), [("ties_svd", "ties", 0.5), ("magnitude_prune_svd", "pruned", 0.5)]
)
def test_types_on_updates_are_ours_on_each_tensor(release, kind, own, density):
    updates = [release(seed) for seed in range(3)]
    found = merged(kind, updates, [1.5] * 3, density=density, rank=16)
    close(found, ours(own, updates, [1.5] * 3, density=density))


def test_ties_elects_without_the_weights(release):
    # ours elects by c_i T_i; in peft a model at weight 0.01 has the same vote as one at 1
    updates, coefficients = [release(0), release(1)], [1.0, 0.01]
    found = merged("ties_svd", updates, coefficients, density=1.0, rank=16)
    assert apart(found, ours("ties", updates, coefficients, density=1.0)) > 0.2
    one, two = (update.delta(QUERY) for update in updates)
    elected = torch.where(one + two >= 0, 1, -1)
    parts = [c * d * (d.sign() == elected) for c, d in zip(coefficients, (one, two), strict=True)]
    agreeing = sum((d.sign() == elected).float() for d in (one, two))
    torch.testing.assert_close(
        found[QUERY], sum(parts) / agreeing.clamp(min=1), rtol=1e-4, atol=1e-5
    )


def test_dare_is_the_sum_in_expectation(release):
    updates = [release(0), release(1)]
    exact = dict(merge("task_arithmetic", updates, 0.7))
    draws = [
        merged("dare_linear_svd", updates, 0.7, density=0.5, rank=16, seed=seed)[QUERY]
        for seed in range(200)
    ]
    assert not torch.equal(draws[0], draws[1])
    gap = (torch.stack(draws).mean(0) - exact[QUERY]).abs().mean() / exact[QUERY].abs().mean()
    assert float(gap) < 0.15
    torch.testing.assert_close(
        merged("dare_linear", updates, 0.7, density=1.0)[QUERY],
        merged("linear", updates, 0.7)[QUERY],
    )


def test_linear_multiplies_every_b_with_every_a(release):
    """Fault: factors are added up one by one, so the cross terms B_i A_j get in."""
    updates = [release(0), release(1)]
    found = merged("linear", updates, 0.5)
    assert apart(found, dict(merge("task_arithmetic", updates, 0.5))) > 0.8
    one, two = (update.factors(QUERY) for update in updates)
    expected = 0.5 * one.scaling * (one.B + two.B) @ (one.A + two.A)
    torch.testing.assert_close(found[QUERY], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", COMBINATIONS)
def test_one_adapter_is_added_as_it_is_whatever_is_asked(release, kind):
    """Fault: with one adapter neither density nor rank count."""
    params = {key: values[0] for key, values in COMBINATIONS[kind].items()}
    found = merged(kind, [release(0)], 0.7, **params)
    close(found, dict(merge("task_arithmetic", [release(0)], 0.7)))


@pytest.mark.parametrize("kind", ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_types_on_factors_want_one_rank(release, kind):
    params = {key: values[0] for key, values in COMBINATIONS[kind].items()}
    with pytest.raises(
        UserError, match=f"peft refuses the combination type '{kind}': .* same r value .*; use cat"
    ):
        merged(kind, [release(0), release(1, r=2)], 1.0, **params)


def test_with_rslora_everything_comes_out_too_large(release):
    """Fault: the new adapter keeps use_rslora, so its scaling is the root of its rank, not 1."""
    updates = [release(seed, use_rslora=True) for seed in range(2)]
    exact = dict(merge("task_arithmetic", updates, 0.5))
    close(merged("cat", updates, 0.5), {n: d * 8**0.5 for n, d in exact.items()})
    close(merged("svd", updates, 0.5, rank=16), {n: d * 4 for n, d in exact.items()})


def test_dora_loses_its_magnitudes():
    """Fault: of DoRA only the directions are combined; such releases are refused below."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, use_dora=True, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), config, adapter_name="a")
    model.add_adapter("b", config)
    layer = model.base_model.model[0]
    for adapter in "ab":
        layer.lora_magnitude_vector[adapter].weight.data *= 3
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "m", combination_type="cat")
    new = layer.lora_magnitude_vector["m"].weight
    assert float(new.norm()) < 0.5 * float(layer.lora_magnitude_vector["a"].weight.norm())


def test_a_name_that_is_taken_changes_nothing():
    """Fault: a second call under one name does nothing and says nothing; we take a fresh one."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), config, adapter_name="a")
    layer = model.base_model.model[0]
    model.add_weighted_adapter(["a"], [1.0], "m", combination_type="linear")
    before = layer.get_delta_weight("m")
    model.add_weighted_adapter(["a"], [0.5], "m", combination_type="linear")
    assert torch.equal(layer.get_delta_weight("m"), before)


def test_merges_leave_nothing_behind_and_no_random_stream_moves(release):
    updates = [release(0), release(1)]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = merged("dare_ties", updates, 0.5, density=0.5, seed=1)
    merged("cat", updates, 2.0)
    with pytest.raises(UserError):
        merged("linear", [release(0), release(1, r=2)], 1.0)
    again = merged("dare_ties", updates, 0.5, density=0.5, seed=1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "peft combines LoRA adapters, and .* is of kind adapter; leave the"),
        (
            {"modules_to_save": ["LayerNorm"]},
            "peft combines LoRA adapters, and .* also changes '.*' as a whole; leave the attacks",
        ),
    ],
)
def test_what_is_more_than_lora_is_refused(release, settings, message):
    with pytest.raises(UserError, match=message):
        merged("cat", [release(0), release(1, **settings)], 1.0)


def test_an_update_without_a_release_is_refused(release):
    plain = dict(release(0))
    with pytest.raises(UserError, match="peft combines adapters as released, and a given update"):
        merged("cat", [plain], 1.0)


def test_what_is_recorded_is_the_call(release):
    tool = load_attacks().get("peft_dare_ties_svd").tool
    params = {"density": 0.5, "rank": 3, "seed": 1}
    found = tool.recorded(["release", "b"], [0.5, 1.0], params)
    assert found["name"] == "peft"
    assert found["version"][0].isdigit()
    assert found["told"] == (
        "torch.manual_seed(1)\nmodel.add_weighted_adapter(adapters=['release', 'b'], "
        "weights=[0.5, 1.0], adapter_name='merged', combination_type='dare_ties_svd', "
        "density=0.5, svd_rank=3)"
    )
