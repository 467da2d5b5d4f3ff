"""Merges on disk: loaded by transformers and peft, they are what the live model computes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from attacks.hiding import hide_folder
from auditing.shelf import Shelf, stock
from trap2.attacks import merged_model
from trap2.attacks.attack import merge
from trap2.attacks.live import LiveModel
from trap2.attacks.write import recorded_base, write_merge
from trap2.errors import UserError
from trap2.update import Update

TOKENS = {"input_ids": torch.tensor([[2, 9, 17, 30], [5, 6, 7, 8]])}


@pytest.fixture(scope="module")
def shelf(pico_base: Path) -> Shelf:
    return stock(pico_base)


@pytest.fixture(scope="module")
def lora(pico_base, tmp_path_factory):
    """Two peft classifiers with heads, of different ranks, targets, scaling and alpha patterns."""
    from peft import LoraConfig, get_peft_model

    root = tmp_path_factory.mktemp("lora")
    shapes = [
        {"r": 2, "lora_alpha": 8, "target_modules": ["query", "value", "word_embeddings"]},
        {
            "r": 3,
            "lora_alpha": 5,
            "use_rslora": True,
            "target_modules": ["query", "dense"],
            "alpha_pattern": {"query": 7},
            "rank_pattern": {"query": 1},
        },
    ]
    for place, shape in enumerate(shapes):
        torch.manual_seed(place)
        model = AutoModelForSequenceClassification.from_pretrained(pico_base, num_labels=3)
        config = LoraConfig(
            **shape,
            task_type="SEQ_CLS",
            init_lora_weights=False,
            exclude_modules=["classifier", "bert.pooler.dense"],
        )
        get_peft_model(model, config).save_pretrained(root / str(place))
    return [Update.open(root / str(place), pico_base) for place in range(2)]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        out = model.eval()(**TOKENS)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def live_logits(model, updates, attack, coefficients, **params) -> torch.Tensor:
    live = LiveModel(model, updates[0].base)
    with live.merged(merge(attack, updates, coefficients, **params)) as merged:
        return logits(merged)


def opened(shelf: Shelf, kind: str) -> list[Update]:
    return [Update.open(shelf.release(kind, r), shelf.base) for r in ("release", "partner")]


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("attack", "params"), [("task_arithmetic", {}), ("slerp", {})])
def test_hidden_releases_are_undone_before_they_are_merged(shelf, tmp_path, attack, params):
    release, partner = opened(shelf, "full")
    place = hide_folder(release.folder, tmp_path / "hidden", "bert", 2, 2, "permuted")
    hidden = [Update.open(place, shelf.base), partner]
    want = write_merge(tmp_path / "want", attack, [release, partner], 0.5, params)
    out = write_merge(tmp_path / "out", attack, hidden, 0.5, params, undo="nearest")
    assert json.loads((out / "merge.json").read_text())["undo"] == "nearest"
    expected = load_file(want / "model.safetensors")
    for name, tensor in load_file(out / "model.safetensors").items():
        close(tensor, expected[name])


def test_an_average_of_releases_is_a_release_again(shelf, tmp_path):
    updates = opened(shelf, "full")
    out = write_merge(tmp_path / "mean", "task_arithmetic", updates, 0.5, {})
    mean, deltas = dict(Update.open(out, shelf.base)), [dict(update) for update in updates]
    for name, delta in mean.items():
        close(delta, 0.5 * deltas[0][name] + 0.5 * deltas[1][name])


def test_full_releases_become_a_classifier_with_the_releases_head(shelf, tmp_path):
    updates = opened(shelf, "full")
    out = write_merge(tmp_path / "out", "ties", updates, 0.7, {"density": 0.5})
    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert type(model).__name__ == "BertForSequenceClassification"
    for name, tensor in updates[0].head.items():
        assert torch.equal(model.state_dict()[name], tensor)
    other = AutoModelForSequenceClassification.from_pretrained(shelf.release("full", "release"))
    other.bert = AutoModel.from_pretrained(shelf.base)
    close(logits(model), live_logits(other, updates, "ties", 0.7, density=0.5))
    assert not torch.allclose(logits(model), logits(other), atol=1e-3)
    AutoTokenizer.from_pretrained(out)


def test_adapters_without_a_head_become_an_encoder(shelf, tmp_path):
    updates = opened(shelf, "lora")
    out = write_merge(tmp_path / "out", "task_arithmetic", updates, [1.0, 0.5], {})
    model = AutoModel.from_pretrained(out)
    base = AutoModel.from_pretrained(shelf.base)
    close(logits(model), live_logits(base, updates, "task_arithmetic", [1.0, 0.5]))


def test_adapters_with_a_head_become_a_classifier_of_as_many_classes(lora, tmp_path):
    out = write_merge(tmp_path / "out", "ties", lora, 0.8, {"density": 0.5})
    model, info = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert model.config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    other = AutoModelForSequenceClassification.from_pretrained(lora[0].base.folder, num_labels=3)
    other.load_state_dict(lora[0].head, strict=False)
    close(logits(model), live_logits(other, lora, "ties", 0.8, density=0.5))


def test_one_model_at_1_is_what_merge_and_unload_gives(lora, tmp_path):
    from peft import PeftModel

    out = write_merge(tmp_path / "out", "task_arithmetic", lora[:1], 1.0, {})
    base = AutoModelForSequenceClassification.from_pretrained(lora[0].base.folder, num_labels=3)
    theirs = PeftModel.from_pretrained(base, lora[0].folder).merge_and_unload()
    close(logits(AutoModelForSequenceClassification.from_pretrained(out)), logits(theirs))


@pytest.mark.parametrize("coefficients", [[0.4, -1.5], 0.7, [1.0, 0.0]])
def test_the_sum_as_an_adapter_is_the_sum_as_a_model(lora, tmp_path, coefficients):
    from peft import PeftModel

    arguments = ("task_arithmetic", lora, coefficients, {})
    adapter = write_merge(tmp_path / "adapter", *arguments, form="adapter")
    whole = write_merge(tmp_path / "model", *arguments)
    base = AutoModelForSequenceClassification.from_pretrained(lora[0].base.folder, num_labels=3)
    loaded = PeftModel.from_pretrained(base, adapter)
    merged = logits(AutoModelForSequenceClassification.from_pretrained(whole))
    close(logits(loaded), merged)
    close(logits(loaded.merge_and_unload()), merged)
    again = Update.open(adapter, lora[0].base.folder)
    for name, delta in merge(*arguments[:3]):
        close(again.delta(name), delta)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 3  # of query, 2 and 1


def test_a_large_model_is_written_in_pieces(shelf, tmp_path, monkeypatch):
    updates = opened(shelf, "full")
    whole = write_merge(tmp_path / "whole", "task_arithmetic", updates, 0.5, {})
    monkeypatch.setattr(merged_model, "SHARD", 4000)
    out = write_merge(tmp_path / "out", "task_arithmetic", updates, 0.5, {})
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    one, other = map(AutoModelForSequenceClassification.from_pretrained, (whole, out))
    assert torch.equal(logits(one), logits(other))


def test_the_base_keeps_its_type(lora, tmp_path):
    base = shutil.copytree(lora[0].base.folder, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    half = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(half, base / "model.safetensors", metadata={"format": "pt"})
    update = Update.open(lora[0].folder, base)
    out = write_merge(tmp_path / "out", "task_arithmetic", [update], 1.0, {})
    written = load_file(out / "model.safetensors")
    name = next(name for name in update.shared if name.endswith("query.weight"))
    expected = (half[name].float() + update.delta(name)).bfloat16()
    assert torch.equal(written["bert." + name], expected)
    assert all(t.dtype == torch.bfloat16 for n, t in written.items() if n.startswith("bert."))


def test_the_record_says_what_it_is_made_of(shelf, tmp_path):
    updates = opened(shelf, "full")
    out = write_merge(tmp_path / "out", "ties", updates, 0.7, {"density": 0.5})
    record = json.loads((out / "merge.json").read_text())
    assert record["attack"] == "ties"
    assert record["coefficients"] == [0.7, 0.7]
    assert record["params"] == {"density": 0.5}
    assert record["head"] == "of the release, not merged"
    assert record["release"] == {"folder": "release", "digest": updates[0].digest}
    assert record["partners"][0]["digest"] == updates[1].digest
    assert record["base"] == updates[0].base.digest


def test_what_is_there_stays_unless_overwritten_and_failure_leaves_nothing(shelf, tmp_path):
    updates, out = opened(shelf, "full"), tmp_path / "out"
    write_merge(out, "task_arithmetic", updates, 0.5, {})
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UserError, match="exists already; pass --overwrite"):
        write_merge(out, "task_arithmetic", updates, 1.0, {})
    with pytest.raises(UserError, match="'fisher' looks at unlabelled rows of every task, which n"):
        write_merge(tmp_path / "other", "fisher", updates, 0.5, {})
    with pytest.raises(UserError, match="density=7 keeps no share of an update"):
        write_merge(out, "ties", updates, 1.0, {"density": 7}, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    write_merge(out, "task_arithmetic", updates, 1.0, {}, overwrite=True)
    assert (out / "model.safetensors").read_bytes() != before["model.safetensors"]


def test_what_is_no_adapter_is_refused_with_the_reason(shelf, lora, tmp_path):
    for attack, updates, message in (
        ("ties", lora, "'ties' gives an update of full rank, which no adapter of the updates' ra"),
        ("task_arithmetic", opened(shelf, "full"), "as a whole and not by LoRA, which an adapter"),
    ):
        params = {"density": 0.5} if attack == "ties" else {}
        with pytest.raises(UserError, match=message):
            write_merge(tmp_path / "out", attack, updates, 1.0, params, form="adapter")
    turned = shutil.copytree(lora[1].folder, tmp_path / "turned")
    path = turned / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": ["query"]}))
    tensors = load_file(turned / "adapter_model.safetensors")
    save_file(
        {n: t for n, t in tensors.items() if "query" in n}, turned / "adapter_model.safetensors"
    )
    path.write_text(json.dumps({**json.loads(path.read_text()), "fan_in_fan_out": True}))
    other = Update.open(turned, lora[0].base.folder)
    with pytest.raises(UserError, match="store their factors in different orientations; write"):
        write_merge(tmp_path / "out", "task_arithmetic", [lora[0], other], 1.0, {}, form="adapter")
    assert [p.name for p in tmp_path.iterdir()] == ["turned"]


def test_the_classes_of_an_adapters_head_come_from_its_record_or_must_be_clear(lora, tmp_path):
    folder = shutil.copytree(lora[0].folder, tmp_path / "named")
    base = lora[0].base.folder
    record = {"recipe": {"base": "x", "task": {"classes": ["low", "middle", "high"]}}}
    (folder / "trap2.json").write_text(json.dumps(record))
    out = write_merge(tmp_path / "out", "task_arithmetic", [Update.open(folder, base)], 1.0, {})
    assert json.loads((out / "config.json").read_text())["id2label"]["1"] == "middle"
    (folder / "trap2.json").unlink()
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.classifier.out_proj.weight"] = torch.ones(3, 16)
    save_file(tensors, path)
    with pytest.raises(
        UserError, match=r"has a head of 2 layers and no config\.json, so its number"
    ):
        write_merge(tmp_path / "out2", "task_arithmetic", [Update.open(folder, base)], 1.0, {})
    assert not (tmp_path / "out2").exists()


def test_a_release_says_its_base_or_is_refused(shelf, lora, tmp_path):
    assert recorded_base(shelf.release("full", "release")) == str(shelf.base)
    assert recorded_base(lora[0].folder) == str(shelf.base)
    for content in (None, "{}", '{"recipe": 3}', '{"recipe": {"base": ["x"]}}'):
        if content is not None:
            (tmp_path / "trap2.json").write_text(content)
        with pytest.raises(UserError, match="does not say which base it was trained on; give --ba"):
            recorded_base(tmp_path)
