import copy

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PrefixTuningConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from every_adapter import TARGETS, bert, move
from trap2.errors import Unsupported
from trap2.protecting.preflight import problems
from trap2.protecting.scaled import LiveUpdate
from trap2.protecting.tuners import Adapter


def gpt2(tied: bool = True) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 12, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, tie_word_embeddings=tied))


def lora(model: nn.Module | None = None, **changes: object) -> nn.Module:
    settings = {"r": 2, "target_modules": TARGETS, **changes}
    return get_peft_model(bert() if model is None else model, LoraConfig(**settings))


def refusal(model: nn.Module) -> str:
    with pytest.raises(Unsupported) as caught:
        LiveUpdate(model)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"layer_replication": [(0, 2), (1, 2)], "target_modules": ["query"]}, "replicated layers"),
        (
            {"init_lora_weights": "pissa_niter_2"},
            "init_lora_weights='pissa_niter_2', which moves the base by what a release does not "
            "hold",
        ),
        (
            {"target_parameters": ["key.weight"]},
            "LoRA on bare parameters",
        ),
    ],
)
def test_adapters_whose_update_is_not_exact_are_refused(settings: dict, reason: str) -> None:
    model = lora(**{k: v for k, v in settings.items() if k != "layer_replication"})
    if "layer_replication" in settings:
        model.peft_config["default"].layer_replication = settings["layer_replication"]
    assert refusal(model) == (
        f"protection would not be exact: the adapter uses {reason}: use one of those in "
        "docs/adapters.md, or train the model without an adapter"
    )


def test_prompts_are_no_update_of_weights() -> None:
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    assert "PREFIX_TUNING, whose merge into the base is not known" in refusal(
        get_peft_model(gpt2(), config)
    )


def test_several_adapters_are_protected_one_at_a_time() -> None:
    model = lora()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["query"]))
    names = {item.name for item in LiveUpdate(model).shared}
    assert names
    assert all(".default." in name for name in names)
    model.set_adapter("second")
    names = {item.name for item in LiveUpdate(model).shared}
    assert names
    assert all(".second." in name for name in names)
    model.base_model.set_adapter(["default", "second"])
    assert refusal(model) == (
        "protection would not be exact: 2 adapters are active at once (default, second) and a "
        "release holds one: activate one with set_adapter"
    )


def test_an_adapter_that_is_not_active_is_not_asked() -> None:
    model = lora()
    model.add_adapter("odd", LoraConfig(r=2, target_modules=["query"], init_lora_weights="pissa"))
    assert LiveUpdate(model).shared


def test_a_merged_adapter_is_refused() -> None:
    model = lora()
    model.merge_adapter()
    assert refusal(model) == (
        "protection would not be exact: adapter 'default' is merged into the base: call "
        "unmerge_adapter() first"
    )


@pytest.mark.parametrize(
    "settings", [{"target_modules": ["wte"]}, {"modules_to_save": ["lm_head"]}]
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_tied_weights_under_an_adapter_are_refused(settings: dict) -> None:
    plan = {"target_modules": ["c_attn"], "fan_in_fan_out": True, **settings}
    one, two = ("transformer.wte", "lm_head")
    if "modules_to_save" in settings:
        one, two = two, one
    assert refusal(lora(gpt2(), **plan)) == (
        f"protection would not be exact: the adapter is on '{one}', which shares its weight with "
        f"'{two}', so that a merge changes both: leave it out of the adapter, or untie them "
        "(tie_word_embeddings=False) before adding it"
    )
    assert LiveUpdate(lora(gpt2(tied=False), **plan)).shared


def test_tokens_of_a_tied_embedding_are_scaled_in_both_places() -> None:
    """peft puts the trained rows on the head too."""
    ids = torch.tensor([[1, 5, 3, 1]])
    model = lora(gpt2(), target_modules=["c_attn"], trainable_token_indices={"wte": [1, 5]}).eval()
    update = LiveUpdate(model)
    move(model)
    W0, merged = gpt2().state_dict(), copy.deepcopy(model).merge_and_unload()
    W1, expected = merged.state_dict(), gpt2().eval()
    expected.load_state_dict({n: W0[n] + 0.37 * (W1[n] - W0[n]) for n in W0})
    with update.at(0.37):
        torch.testing.assert_close(model(ids).logits, expected(ids).logits)
    torch.testing.assert_close(model(ids).logits, merged.eval()(ids).logits)


def test_what_no_release_would_hold_is_refused() -> None:
    model = lora()
    for name, parameter in model.named_parameters():
        if "LayerNorm" in name:
            parameter.requires_grad_(True)
    assert refusal(model) == (
        "protection would not be exact: 'base_model.model.embeddings.LayerNorm.weight' (and 9 "
        "more) is trained beside the adapter and is neither part of it nor of a task head: freeze "
        "it, or list its module in modules_to_save"
    )


def test_all_problems_are_told_at_once() -> None:
    model = lora(init_lora_weights="pissa_niter_2")
    model.add_adapter("second", LoraConfig(r=2, target_modules=["query"]))
    model.base_model.set_adapter(["default", "second"])
    model.base_model.model.pooler.requires_grad_(True)
    assert len(list(problems(model, Adapter(model)))) == 3
    message = refusal(model)
    assert message.startswith("protection would not be exact: (1) the adapter uses init_lora")
    assert "; (2) 2 adapters are active at once" in message
    assert "; (3) 'base_model.model.pooler.dense.weight' (and 1 more) is trained" in message


@pytest.mark.parametrize(
    "config",
    [
        AdaLoraConfig(total_step=10, target_modules=["query"]),
        IA3Config(target_modules=["query"], feedforward_modules=[]),
        LoraConfig(target_modules=["query"], modules_to_save=["pooler"], bias="all"),
    ],
)
def test_nothing_is_said_where_nothing_is_in_the_way(config: object) -> None:
    model = get_peft_model(bert(), config)
    assert list(problems(model, Adapter(model))) == []
    assert list(problems(bert(), Adapter(bert()))) == []
