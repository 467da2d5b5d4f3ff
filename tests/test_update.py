"""The update of a release against two oracles: the formula, and peft's own merge_and_unload."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2Model,
)

from trap2.adapters import PEFT_PREFIX, adapter_refusals
from trap2.errors import Trap2Error, Unsupported, UserError
from trap2.naming import is_head
from trap2.update import Update

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
LINEAR = ["query", "value", "dense"]


class ConvNet(nn.Module):
    """A kxk, a pointwise and a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, (3, 2), padding=1, bias=False)
        self.point = nn.Conv2d(4, 6, 1)
        self.depth = nn.Conv2d(6, 6, 3, groups=3)
        self.classifier = nn.Linear(6, 2)


def bert() -> nn.Module:
    torch.manual_seed(0)
    return BertModel(bert_config())


def bert_config() -> BertConfig:
    return BertConfig(
        vocab_size=12,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=8,
        num_labels=3,
        initializer_range=0.3,
    )


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2Model(GPT2Config(vocab_size=12, n_positions=8, n_embd=8, n_layer=1, n_head=2))


def convnet() -> nn.Module:
    torch.manual_seed(0)
    return ConvNet()


def under_a_head(encoder: nn.Module) -> nn.Module:
    """The same encoder below a classification head, as `bert.`."""
    model = BertForSequenceClassification(bert_config())
    model.bert.load_state_dict(encoder.state_dict())
    return model


def save(model: nn.Module, folder: Path) -> Path:
    """A checkpoint folder of any module."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {n: t.contiguous() for n, t in model.state_dict().items()}, folder / "model.safetensors"
    )
    return folder


def adapt(model: nn.Module, folder: Path, **settings: Any) -> nn.Module:
    """Put a random adapter on a model and save it as peft does."""
    adapted = get_peft_model(model, LoraConfig(**settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    adapted.save_pretrained(folder)
    return adapted


def merged(adapted: nn.Module, s: float) -> dict[str, Tensor]:
    """Peft's merge with every LoRA update at scale s."""
    adapted = copy.deepcopy(adapted)
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            module.scaling["default"] *= s  # scale_layer leaves embeddings out
    state: dict[str, Tensor] = adapted.merge_and_unload().state_dict()
    return state


def close(one: Tensor, two: Tensor) -> bool:
    return torch.allclose(one, two, rtol=1e-5, atol=1e-6)


ADAPTERS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "lora": (bert, {"target_modules": LINEAR, "r": 3, "lora_alpha": 5}),
    "rslora": (bert, {"target_modules": LINEAR, "r": 3, "lora_alpha": 5, "use_rslora": True}),
    "patterns": (
        bert,
        {
            "target_modules": LINEAR,
            "r": 3,
            "lora_alpha": 5,
            "rank_pattern": {"query": 1, r"layer\.1\.output\.dense": 2},
            "alpha_pattern": {"value": 7, r"encoder.layer.0.attention.self.query": 9},
        },
    ),
    "rslora with patterns": (
        bert,
        {
            "target_modules": LINEAR,
            "use_rslora": True,
            "rank_pattern": {"query": 2},
            "alpha_pattern": {"query": 3, "intermediate.dense": 1},
        },
    ),
    "embedding": (bert, {"target_modules": ["word_embeddings", "query"], "r": 2}),
    "Conv1D": (gpt2, {"target_modules": ["c_attn", "c_proj"], "r": 2, "fan_in_fan_out": True}),
    "convolutions": (convnet, {"target_modules": ["first", "point"], "r": 2, "lora_alpha": 3}),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_at_a_scale_is_what_peft_merges(name: str, tmp_path: Path) -> None:
    make, settings = ADAPTERS[name]
    base = save(make(), tmp_path / "base")
    adapted = adapt(make(), tmp_path / "release", **settings)
    update = Update.open(tmp_path / "release", base)
    assert update.kind == "lora"
    assert update.head == {}
    assert update.shared
    for s in (1.0, 0.37):
        oracle, origin = merged(adapted, s), load_file(base / "model.safetensors")
        for tensor in origin:
            if tensor in update.shared:
                assert not torch.equal(oracle[tensor], origin[tensor])
                assert close(update.scaled(tensor, s), oracle[tensor]), tensor
            else:
                assert torch.equal(oracle[tensor], origin[tensor]), tensor


def test_a_head_and_a_whole_module_saved_beside_an_adapter(tmp_path: Path) -> None:
    base = save(bert(), tmp_path / "base")
    adapted = adapt(
        under_a_head(bert()),
        tmp_path / "release",
        target_modules=["query", "value"],
        modules_to_save=["classifier", "pooler"],
    )
    update, oracle = Update.open(tmp_path / "release", base), merged(adapted, 1.0)
    assert sorted(update.head) == ["classifier.bias", "classifier.weight"]
    assert all(torch.equal(update.head[name], oracle[name]) for name in update.head)
    assert len(update.shared) == 6
    assert {"pooler.dense.weight", "pooler.dense.bias"} <= {*update.shared}
    for name in update.shared:
        assert close(update.scaled(name, 1.0), oracle[f"bert.{name}"])
    name = "pooler.dense.weight"
    half = 0.63 * update.base.tensor(name) + 0.37 * oracle[f"bert.{name}"]
    assert close(update.scaled(name, 0.37), half)


@given(
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4)),
    alpha=st.floats(0.25, 64),
    dtypes=st.tuples(DTYPES, DTYPES),
    rslora=st.booleans(),
    transposed=st.booleans(),
    prefix=st.sampled_from(["", "model."]),
    s=st.floats(-2, 2),
)
def test_any_linear_adapter_is_scaling_times_b_times_a(
    sizes: tuple[int, int, int],
    alpha: float,
    dtypes: tuple[torch.dtype, torch.dtype],
    rslora: bool,
    transposed: bool,
    prefix: str,
    s: float,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    rows, columns, rank = sizes
    generator = torch.Generator().manual_seed(rows * 100 + columns * 10 + rank)
    shape = (columns, rows) if transposed else (rows, columns)
    origin = torch.randn(shape, generator=generator).to(dtypes[0])
    a = (torch.randn(rank, columns, generator=generator) + 3).to(dtypes[1])
    b = (torch.randn(rows, rank, generator=generator) + 3).to(dtypes[1])
    save_file(
        {"layer.weight": origin, "layer.bias": torch.ones(rows)}, folder / "model.safetensors"
    )
    key = f"{PEFT_PREFIX}{prefix}layer"
    save_file(
        {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "lora_alpha": alpha, "r": rank, "use_rslora": rslora}
    config["fan_in_fan_out"] = transposed
    (folder / "adapter_config.json").write_text(json.dumps(config))
    update = Update.open(folder, folder)
    change = alpha / (rank**0.5 if rslora else rank) * (b.double() @ a.double())
    expected = origin.double() + s * (change.T if transposed else change)
    assert update.shared == ("layer.weight",)
    assert update.parameters == rows * columns
    found = update.scaled("layer.weight", s)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("prefixed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_full_checkpoint_is_released_minus_base(
    tmp_path: Path, prefixed: bool, dtype: torch.dtype
) -> None:
    origin = bert().to(dtype)
    torch.manual_seed(2)
    tuned = copy.deepcopy(origin)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape).to(dtype))
    released = under_a_head(tuned).to(dtype) if prefixed else tuned
    update = Update.open(save(released, tmp_path / "out"), save(origin, tmp_path / "base"))
    before, after = origin.state_dict(), tuned.state_dict()
    assert update.kind == "full"
    assert update.shared == tuple(sorted(n for n, t in before.items() if t.is_floating_point()))
    for name, delta in update:
        assert delta.dtype == torch.float32
        assert torch.equal(delta, after[name].float() - before[name].float())
        assert close(update.scaled(name, 1.0), after[name].float())
    heads = ["classifier.bias", "classifier.weight"] if prefixed else []
    assert sorted(update.head) == heads
    assert not any(is_head(name) for name in update.shared)


def test_a_base_with_a_head_of_its_own_shares_everything_but_the_head(tmp_path: Path) -> None:
    base = under_a_head(bert())
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.bert.pooler.dense.weight += 1
        tuned.classifier.weight += 1
    update = Update.open(save(tuned, tmp_path / "out"), save(base, tmp_path / "base"))
    assert not any(is_head(name) for name in update.shared)
    assert sorted(update.head) == ["classifier.bias", "classifier.weight"]
    assert [name for name, delta in update if delta.any()] == ["bert.pooler.dense.weight"]


def test_sharded_checkpoints_give_the_same_update(tmp_path: Path) -> None:
    origin, tuned = bert(), bert()
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(1.5)
    for name, model in (("base", origin), ("out", tuned)):
        model.save_pretrained(tmp_path / name, max_shard_size=3000)
        assert (tmp_path / name / "model.safetensors.index.json").is_file()
    sharded = Update.open(tmp_path / "out", tmp_path / "base")
    whole = Update.open(save(tuned, tmp_path / "out1"), save(origin, tmp_path / "base1"))
    assert set(sharded.shared) == set(whole.shared)
    for name, delta in sharded:
        assert torch.equal(delta, whole.delta(name))


# Refusals


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base` and a sound adapter `release`; copy it before changing it."""
    folder = tmp_path_factory.mktemp("sound")
    save(bert(), folder / "base")
    adapt(bert(), folder / "release", target_modules=["query"], r=2)
    Update.open(folder / "release", folder / "base")
    return folder


@pytest.fixture
def place(adapter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapter, tmp_path / "place"))


def configure(place: Path, **changes: Any) -> None:
    path = place / "release" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(path)), path)


def refusal(place: Path, kind: type[Trap2Error] = UserError) -> str:
    with pytest.raises(kind) as caught:
        Update.open(place / "release", place / "base")
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"peft_type": "PREFIX_TUNING"},
            "PREFIX_TUNING, whose merge into the base is not known to be exact",
        ),
        ({"peft_type": None}, "None, whose merge into the base is not known to be exact"),
        (
            {"peft_type": "OFT", "bias": "all"},
            "bias='all', which is exact beside LoRA alone",
        ),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights='pissa_niter_4', which moves the base by what a release does not "
            "hold",
        ),
        (
            {"init_lora_weights": "lora_ga"},
            "init_lora_weights='lora_ga', which moves the base by what a release does not hold",
        ),
        ({"kasa_config": {"beta": 1}}, "KaSA"),
        ({"use_qalora": True}, "QALoRA"),
        ({"layer_replication": [[0, 1]]}, "replicated layers"),
        ({"target_parameters": ["w"]}, "LoRA on bare parameters"),
        ({"kasa_config": {"beta": 1}, "use_qalora": True}, "QALoRA; KaSA"),
    ],
)
def test_adapters_that_are_not_exact_are_refused(
    place: Path, changes: dict[str, Any], reason: str
) -> None:
    configure(place, **changes)
    assert refusal(place, Unsupported) == (
        f"{place / 'release'} uses {reason}: not exact yet; merge it into a full checkpoint with "
        "peft's merge_and_unload and give that"
    )


@pytest.mark.parametrize("changes", [{}, {"init_lora_weights": "gaussian"}, {"use_rslora": True}])
def test_exact_adapters_are_not_refused(changes: dict[str, Any]) -> None:
    assert adapter_refusals(LoraConfig(**changes).to_dict()) == []


def test_a_grouped_convolution_is_refused(tmp_path: Path) -> None:
    save(convnet(), tmp_path / "base")
    with pytest.warns(UserWarning, match="groups"):
        adapt(convnet(), tmp_path / "release", target_modules=["depth"], r=3)
    message = refusal(tmp_path, Unsupported)
    assert "adapts 'depth' with factors of shape (3, 6, 3, 3) and (6, 1, 1, 1)" in message
    assert message.endswith(
        "only linear, embedding and ungrouped 2-D convolution layers are exact yet"
    )


def test_an_adapter_that_names_another_base_is_refused(place: Path) -> None:
    configure(place, base_model_name_or_path="someone/other-model")
    assert refusal(place) == (
        f"{place / 'release'} names 'someone/other-model' as its base, but {place / 'base'} is "
        "base; give that base, or correct base_model_name_or_path in adapter_config.json if it is "
        "the same"
    )


@pytest.mark.parametrize("named", ["someone/Base", "/elsewhere/base", None, ""])
def test_an_adapter_that_names_its_base_or_none_is_opened(place: Path, named: str | None) -> None:
    configure(place, base_model_name_or_path=named)
    assert Update.open(place / "release", place / "base").shared


def test_a_base_in_the_hub_cache_goes_by_its_id(place: Path) -> None:
    snapshot = place / "models--someone--Tiny-Bert" / "snapshots" / "0123abc"
    shutil.copytree(place / "base", snapshot)
    configure(place, base_model_name_or_path="someone/tiny-bert")
    assert Update.open(place / "release", snapshot).shared
    configure(place, base_model_name_or_path="someone/other-bert")
    with pytest.raises(UserError, match="names 'someone/other-bert' as its base"):
        Update.open(place / "release", snapshot)


def test_a_base_that_recorded_its_name_goes_by_it(place: Path) -> None:
    (place / "base" / "config.json").write_text(json.dumps({"_name_or_path": "someone/tiny"}))
    configure(place, base_model_name_or_path="someone/tiny")
    assert Update.open(place / "release", place / "base").shared


def test_a_recorded_digest_decides_over_a_name(place: Path) -> None:
    right = Update.open(place / "release", place / "base").base.digest
    configure(place, base_model_name_or_path="someone/other-model")
    record = place / "release" / "trap2.json"
    record.write_text(json.dumps({"digests": {"base": right}}))
    assert Update.open(place / "release", place / "base").shared
    record.write_text(json.dumps({"digests": {"base": "sha256:00"}}))
    assert refusal(place) == (
        f"{place / 'release'} was trained on a base with digest sha256:00, but {place / 'base'} "
        f"has {right}; give the base it was trained on"
    )


def test_an_adapter_for_other_modules_is_refused(place: Path) -> None:
    save(gpt2(), place / "base")
    message = refusal(place)
    assert "adapts 'encoder.layer.0.attention.self.query.weight', which the base" in message
    assert "(2 of 2 targets); give the base it was trained on" in message


def test_an_adapter_for_other_shapes_is_refused(place: Path) -> None:
    rewrite(
        place / "base" / "model.safetensors",
        lambda tensors: {
            n: torch.cat([t, t]) if "query.weight" in n else t for n, t in tensors.items()
        },
    )
    assert refusal(place) == (
        f"'encoder.layer.0.attention.self.query.weight' in {place / 'release'} has shape (8, 8), "
        f"but (16, 8) in the base {place / 'base'}; give the base it was trained on"
    )


def test_an_adapter_without_its_lora_b_or_alpha_is_refused(place: Path) -> None:
    lost = f"{PEFT_PREFIX}encoder.layer.1.attention.self.query.lora_B.weight"
    rewrite(
        place / "release" / "adapter_model.safetensors",
        lambda tensors: {n: t for n, t in tensors.items() if n != lost},
    )
    assert refusal(place) == f"{place / 'release'} lacks tensor '{lost}'; download it again"
    configure(place, lora_alpha=None)
    assert refusal(place).endswith("adapter_config.json has no lora_alpha; download it again")


def test_an_adapter_pickle_is_refused(place: Path) -> None:
    weights = place / "release" / "adapter_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    message = refusal(place)
    assert message.startswith(f"{weights.with_suffix('.bin')} is a pickle, which can run code")
    assert "safe_serialization=True" in message


def test_broken_numbers_in_an_adapter_are_refused(place: Path) -> None:
    rewrite(
        place / "release" / "adapter_model.safetensors",
        lambda tensors: {n: t * float("nan") if ".1." in n else t for n, t in tensors.items()},
    )
    message = refusal(place)
    assert "holds NaN or infinity; the weights are broken, train or download them again" in message


def test_an_adapter_that_changes_nothing_is_refused(place: Path) -> None:
    rewrite(
        place / "release" / "adapter_model.safetensors",
        lambda tensors: {n: t * (0 if "lora_B" in n else 1) for n, t in tensors.items()},
    )
    assert refusal(place) == (
        f"{place / 'release'} equals its base {place / 'base'}: every update is zero; give a "
        "fine-tuned release"
    )


def test_a_full_release_that_equals_its_base_is_refused(tmp_path: Path) -> None:
    save(bert(), tmp_path / "base")
    save(under_a_head(bert()), tmp_path / "release")
    assert "every update is zero; give a fine-tuned release" in refusal(tmp_path)


def test_a_full_release_of_other_shapes_is_refused(tmp_path: Path) -> None:
    save(bert(), tmp_path / "base")
    config = bert_config()
    config.vocab_size = 13
    save(BertModel(config), tmp_path / "release")
    assert refusal(tmp_path) == (
        f"'embeddings.word_embeddings.weight' in {tmp_path / 'release'} has shape (13, 8), but "
        f"(12, 8) in the base {tmp_path / 'base'}; give the base it was trained on"
    )


@pytest.mark.parametrize("layers", [1, 3])
def test_a_release_of_another_depth_is_refused(tmp_path: Path, layers: int) -> None:
    save(bert(), tmp_path / "base")
    config = bert_config()
    config.num_hidden_layers = layers
    save(BertModel(config), tmp_path / "release")
    deeper = "base" if layers == 1 else "release"
    assert refusal(tmp_path) == (
        f"{tmp_path / 'release'} has another depth than {tmp_path / 'base'}: only "
        f"{tmp_path / deeper} has 'encoder.layer.{min(layers, 2)}.attention.output.LayerNorm."
        "bias'; give releases of one base"
    )


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    save(bert(), tmp_path / "base")
    save(gpt2(), tmp_path / "release")
    assert refusal(tmp_path) == (
        f"{tmp_path / 'release'} shares no tensor with the base {tmp_path / 'base'}; give the base "
        "it was trained on"
    )
    mixed = {f"blocks.{i}.weight": torch.ones(2) for i in range(3)}
    mixed["embeddings.word_embeddings.weight"] = torch.ones(12, 8)
    save_file(mixed, tmp_path / "release" / "model.safetensors")
    message = refusal(tmp_path)
    assert "is another architecture than" in message
    assert "3 of its tensors are unknown there, such as 'blocks.0.weight'" in message
    assert message.endswith("give releases of one base")


def test_a_missing_release_or_base_is_refused(adapter: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    for release, base in ((nowhere, adapter / "base"), (adapter / "release", nowhere)):
        with pytest.raises(UserError) as caught:
            Update.open(release, base)
        assert str(caught.value) == f"{nowhere} is not a folder; give a folder of released weights"
