"""A task's head on a base: by hand, on the same encoder, and never with invented weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
)

import pico
from auditing.shelf import stock
from trap2.errors import Trap2Error, UserError
from trap2.tasks.model import (
    DescriptionClassifier,
    Inputs,
    base_folder,
    build,
    load_encoder,
    load_head,
    load_release,
)
from trap2.taskspec import TaskSpec
from trap2.update import Update

TEXTS = ["w1 w2 w3 w4 w5", "w30", "w7 w8"]


def task(descriptions: bool = True, **changes: Any) -> TaskSpec:
    content = pico.task("t", {"train": "unused.csv"}, descriptions)
    return TaskSpec.model_validate(content | changes)


def image_task() -> TaskSpec:
    return task(descriptions=False, kind="image")


def assemble(base: Path, spec: TaskSpec) -> tuple[Any, Any, Inputs]:
    inputs, encoder = Inputs(base, spec), load_encoder(base)
    return build(base, spec, encoder, inputs), encoder, inputs


def test_a_description_head_is_temperature_times_cosine_of_mean_pooled_states(
    pico_base: Path,
) -> None:
    spec = task(temperature=7.0)
    model, encoder, inputs = assemble(pico_base, spec)
    tokenizer, plain = (
        AutoTokenizer.from_pretrained(pico_base),
        BertModel.from_pretrained(pico_base),
    )

    def pooled(text: str) -> torch.Tensor:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        return plain.eval()(ids, torch.ones_like(ids)).last_hidden_state[0].mean(0)

    with torch.no_grad():
        logits = model(**inputs.batch(inputs.encode(TEXTS))).logits
        for text, row in zip(TEXTS, logits, strict=True):
            for description, logit in zip(spec.descriptions or [], row, strict=True):
                cosine = F.cosine_similarity(pooled(text), pooled(description), dim=0)
                assert float(logit) == pytest.approx(7 * float(cosine), abs=1e-4)
    assert isinstance(model, DescriptionClassifier)
    assert model.encoder is encoder
    assert not model.training


def test_a_description_head_has_no_weights_and_gives_the_loss(pico_base: Path) -> None:
    model, encoder, inputs = assemble(pico_base, task())
    assert len(list(model.parameters())) == len(list(encoder.parameters()))
    assert "prototypes" not in model.state_dict()
    labels = torch.tensor([2, 0, 1])
    with torch.no_grad():
        output = model(labels=labels, **inputs.batch(inputs.encode(TEXTS)))
    assert float(output.loss) == pytest.approx(float(F.cross_entropy(output.logits, labels)))
    assert not model.prototypes.requires_grad


def test_a_classifier_sits_on_the_same_encoder_and_its_head_is_always_the_same(
    pico_base: Path,
) -> None:
    torch.manual_seed(9)
    state = torch.get_rng_state()
    model, encoder, inputs = assemble(pico_base, task(descriptions=False))
    torch.manual_seed(10)
    again, _, _ = assemble(pico_base, task(descriptions=False))
    assert model.bert is encoder
    assert torch.equal(model.classifier.weight, again.classifier.weight)
    assert model(**inputs.batch(inputs.encode(TEXTS))).logits.shape == (3, 3)
    torch.set_rng_state(state)


def test_building_draws_nothing_from_the_global_stream(pico_base: Path) -> None:
    spec = task(descriptions=False)
    inputs, encoder = Inputs(pico_base, spec), load_encoder(pico_base)
    state = torch.get_rng_state()
    build(pico_base, spec, encoder, inputs)
    assert torch.equal(torch.get_rng_state(), state)


def test_texts_are_cut_to_the_length_asked_for_and_padded_with_a_mask(pico_base: Path) -> None:
    inputs = Inputs(pico_base, task(max_length=3))
    assert [len(ids) for ids in inputs.encode(TEXTS)] == [3, 1, 2]
    batch = inputs.batch(inputs.encode(TEXTS))
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]


def test_images_in_any_mode_are_classified(pico_vit: Path) -> None:
    model, encoder, inputs = assemble(pico_vit, image_task())
    images = [Image.new(mode, (9, 5)) for mode in ("RGB", "L", "RGBA", "P")]
    batch = inputs.batch(inputs.encode(images))
    assert batch["pixel_values"].shape == (4, 3, 8, 8)
    assert model(**batch).logits.shape == (4, 3)
    assert model.vit is encoder


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_a_released_head_must_be_whole(pico_base: Path, change: str) -> None:
    model, _, _ = assemble(pico_base, task(descriptions=False))
    head = {"classifier.weight": torch.ones(3, 16), "classifier.bias": torch.ones(3)}
    load_head(model, task(descriptions=False), head | {"other": torch.ones(1)}, Path("release"))
    assert torch.equal(model.classifier.weight, torch.ones(3, 16))
    if change == "missing":
        del head["classifier.bias"]
    else:
        head["classifier.bias"] = torch.ones(2)
    with pytest.raises(UserError) as caught:
        load_head(model, task(descriptions=False), head, Path("release"))
    found = "nothing" if change == "missing" else "(2,)"
    assert str(caught.value) == (
        f"release has {found} for head tensor 'classifier.bias', (3,) is needed; check "
        "task.classes and that the release includes its head"
    )


def test_loading_a_head_leaves_the_encoder_and_description_heads_alone(pico_base: Path) -> None:
    model, encoder, _ = assemble(pico_base, task(descriptions=False))
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    head = {"classifier.weight": torch.ones(3, 16), "classifier.bias": torch.ones(3)}
    load_head(
        model,
        task(descriptions=False),
        head | {"bert.pooler.dense.bias": torch.ones(16)},
        Path("release"),
    )
    assert all(torch.equal(before[n], t) for n, t in encoder.state_dict().items())
    described, _, _ = assemble(pico_base, task())
    load_head(described, task(), {}, Path("release"))


@pytest.fixture
def base(pico_base: Path, tmp_path: Path) -> Path:
    """A copy of the base to damage."""
    return Path(shutil.copytree(pico_base, tmp_path / "copy"))


def test_a_base_without_its_tokenizer_is_refused(base: Path, pico_vit: Path) -> None:
    for path in base.glob("tokenizer*"):
        path.unlink()
    for folder, spec, what in (
        (base, task(), "tokenizer"),
        (base, image_task(), "image processor"),
    ):
        with pytest.raises(UserError) as caught:
            Inputs(folder, spec)
        assert str(caught.value) == (
            f"base {folder} has no usable {what}; copy its files beside the weights"
        )


def test_an_incomplete_base_is_refused_instead_of_filled_at_random(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    kept = {n: t for n, t in weights.items() if "layer.1.output" not in n}
    save_file(kept, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(Trap2Error) as caught:
        load_encoder(base)
    assert str(caught.value) == (
        f"base {base} lacks 4 weights, such as 'encoder.layer.1.output.LayerNorm.bias'; they would "
        "be random: give a complete checkpoint"
    )


def test_a_base_without_the_pooler_its_head_reads_is_refused(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    kept = {n: t for n, t in weights.items() if "pooler" not in n}
    save_file(kept, base / "model.safetensors", {"format": "pt"})
    assemble(base, task())
    with pytest.raises(UserError) as caught:
        assemble(base, task(descriptions=False))
    assert str(caught.value) == (
        f"base {base} has no pooler, which its classification head reads and which would be "
        "random; give task.descriptions or another base"
    )


def test_a_base_stored_in_half_precision_is_loaded_in_full(base: Path) -> None:
    BertModel.from_pretrained(base).half().save_pretrained(base)
    encoder = load_encoder(base)
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    assert not encoder.training


def test_a_base_that_says_nothing_of_its_kind_is_refused(base: Path) -> None:
    (base / "config.json").write_text(json.dumps({"hidden_size": 16}))
    with pytest.raises(UserError, match=r"^cannot load base .*; check config\.json$") as caught:
        load_encoder(base)
    assert "\n" not in str(caught.value)


def test_a_base_without_a_head_of_the_kind_is_refused(pico_base: Path, pico_vit: Path) -> None:
    spec = image_task()
    inputs = Inputs(pico_vit, spec)
    with pytest.raises(UserError) as caught:
        build(pico_base, spec, load_encoder(pico_base), inputs)
    assert str(caught.value) == (
        f"base {pico_base} (bert) has no image classification head in transformers; give "
        "task.descriptions or another base"
    )


def test_a_local_base_is_its_own_folder_and_must_hold_weights(base: Path) -> None:
    assert base_folder(str(base)) == base
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(UserError, match="is a pickle, which can run code"):
        base_folder(str(base))
    (base / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        base_folder(str(base))


def test_a_base_that_is_nowhere_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = tmp_path / "nowhere"
    with pytest.raises(UserError) as caught:
        base_folder(str(missing))
    message = str(caught.value)
    assert message.startswith(f"base '{missing}' is no folder here and cannot be had from the Hub")
    assert message.endswith("; check the path, the id or the network")
    assert "\n" not in message


def test_other_encoders_have_their_own_heads_loaded_whole(tmp_path: Path, pico_base: Path) -> None:
    config = DistilBertConfig(
        vocab_size=42, dim=16, n_layers=1, n_heads=2, hidden_dim=16, max_position_embeddings=32
    )
    DistilBertModel(config).save_pretrained(tmp_path)
    for path in pico_base.glob("tokenizer*"):
        shutil.copy(path, tmp_path)
    model, encoder, _ = assemble(tmp_path, task(descriptions=False))
    assert model.distilbert is encoder
    head = {n: torch.ones_like(t) for n, t in model.state_dict().items() if "classifier" in n}
    assert sorted(head) == [
        "classifier.bias",
        "classifier.weight",
        "pre_classifier.bias",
        "pre_classifier.weight",
    ]
    load_head(model, task(descriptions=False), head, tmp_path)
    assert torch.equal(model.pre_classifier.bias, torch.ones(16))


@pytest.mark.parametrize(("kind", "described"), [("lora", True), ("full", False)])
def test_a_release_is_loaded_as_its_users_load_it(
    pico_base: Path, kind: str, described: bool
) -> None:
    shelf = stock(pico_base)
    update = Update.open(shelf.release(kind, "release"), pico_base)
    spec = task(described)
    model = load_release(update, spec)
    assert not model.training
    inputs = Inputs(pico_base, spec)
    batch = inputs.batch(inputs.encode(TEXTS))
    if kind == "lora":
        loaded = PeftModel.from_pretrained(load_encoder(pico_base), update.folder)
        model = model.encoder
        read = "last_hidden_state"
    else:
        loaded = BertForSequenceClassification.from_pretrained(update.folder).eval()
        read = "logits"
    with torch.no_grad():
        own, users = (getattr(m(**batch), read) for m in (model, loaded))
    torch.testing.assert_close(own, users)


def test_a_release_nobody_can_load_is_refused_in_one_line(pico_base: Path, tmp_path: Path) -> None:
    shelf = stock(pico_base)
    folder = shutil.copytree(shelf.release("lora", "release"), tmp_path / "release")
    update = Update.open(folder, pico_base)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match=r"has no adapter_model\.safetensors; save it again") as one:
        load_release(update, task())
    assert "\n" not in str(one.value)
    (folder / "adapter_model.bin").rename(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": 5}))
    with pytest.raises(UserError, match=r"cannot load .* as a model: "):
        load_release(update, task())


def test_code_in_a_folder_is_neither_run_nor_asked_about(
    pico_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "y")
    folder = shutil.copytree(pico_base, tmp_path / "base")
    config = {"model_type": "mine", "auto_map": {"AutoModel": "mine.Mine", "AutoConfig": "mine.C"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(UserError, match=r"cannot load base .* check config"):
        load_encoder(folder)
    assert asked == []
