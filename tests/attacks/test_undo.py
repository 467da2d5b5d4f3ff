"""Undoing rival defences: real models, hidden as the rivals hide them, found again and merged."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from attacks.hiding import RIVALS, hide, hide_folder
from trap2.attacks.anatomy import LAYOUTS, anatomy
from trap2.attacks.attack import merge
from trap2.attacks.merged_model import write_model
from trap2.attacks.undo import undone
from trap2.checkpoint import Checkpoint
from trap2.errors import UserError
from trap2.files import read_json, write_json
from trap2.update import Update

DATA = os.environ.get("TRAP2_DATA")
TOKENS = torch.tensor([[1, 5, 9, 2, 14, 3], [1, 7, 3, 2, 8, 8]])
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"intermediate_size": 48, "initializer_range": 0.3}
TEXT = {"vocab_size": 16, "max_position_embeddings": 16, "num_key_value_heads": 2}
IMAGE = {"image_size": 8, "patch_size": 4}
FAMILIES = {kind: "llama" if "gate" in str(layout) else kind for kind, layout in LAYOUTS.items()}
FAMILIES |= {"roberta": "bert", "xlm-roberta": "bert"}


def save_pico(folder: Path, kind: str) -> Path:
    from transformers import AutoConfig

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SHAPE, **(IMAGE if kind == "vit" else TEXT))
    if FAMILIES[kind] == "bert":
        config.num_key_value_heads = None
    model = AutoModel.from_config(config)
    for name, tensor in model.named_parameters():
        if "bias" in name:
            tensor.data.normal_(0, 0.3)
    model.save_pretrained(folder)
    return folder


def tuned(base: Path, folder: Path, seed: int, size: float = 0.05) -> Path:
    """A full release: every tensor changed by a share of its own size."""
    shutil.copytree(base, folder)
    draw = torch.Generator().manual_seed(seed)
    tensors = load_file(base / "model.safetensors")
    for name, tensor in tensors.items():
        change = torch.randn(tensor.shape, generator=draw) * size
        tensors[name] = tensor + change * tensor.square().mean().sqrt()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


class World:
    """A base, a release of it, a partner, and what they answer."""

    def __init__(self, root: Path, base: Path, kind: str) -> None:
        config = read_json(base / "config.json")
        self.family, self.root, self.base = FAMILIES[kind], root, base
        self.heads = config["num_attention_heads"]
        self.groups = config.get("num_key_value_heads") or self.heads
        self.release = Update.open(tuned(base, root / "release", 1), base)
        self.partner = Update.open(tuned(base, root / "partner", 2), base)
        self.image = kind == "vit"
        self.start = self.answers([])
        self.alone = self.answers(self.release)
        self.together = self.merged(self.release)

    def hidden(self, rival: str) -> Update:
        folder = self.root / rival
        if not folder.exists():
            args = (self.family, self.heads, self.groups, rival)
            hide_folder(self.release.folder, folder, *args)
        return Update.open(folder, self.base)

    @torch.no_grad()
    def answers(self, deltas) -> torch.Tensor:
        """What W0 + dW answers, as transformers loads it."""
        folder = self.root / "written"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write_model(folder, self.release, deltas)
        model = AutoModel.from_pretrained(folder).eval()
        draw = torch.Generator().manual_seed(0)
        inputs = torch.rand(2, 3, 8, 8, generator=draw) if self.image else TOKENS
        return model(inputs).last_hidden_state

    def merged(self, update) -> torch.Tensor:
        return self.answers(merge("task_arithmetic", [update, self.partner], 0.5))


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    made: dict[str, World] = {}

    def get(kind: str) -> World:
        if kind not in made:
            root = tmp_path_factory.mktemp(kind)
            if kind == "stories":
                made[kind] = World(root, Path(DATA or "") / "models/stories260k", "llama")
            else:
                made[kind] = World(root, save_pico(root / "base", kind), kind)
        return made[kind]

    return get


def far(one: torch.Tensor, other: torch.Tensor, base: torch.Tensor) -> float:
    """How far two answers are apart, as a share of what fine-tuning and merging changed."""
    return float((one - other).norm() / (other - base).norm())


@pytest.mark.parametrize(
    ("kind", "rival"),
    [
        *(("bert", rival) for rival in RIVALS),
        *(("llama", rival) for rival in RIVALS),
        *((kind, "all") for kind in ("vit", "qwen2", "stories")),
    ],
)
def test_a_hidden_release_is_undone_and_merges_as_if_it_had_not_hidden(worlds, kind, rival):
    if kind == "stories" and DATA is None:
        pytest.skip("TRAP2_DATA names no folder with a language model")
    world = worlds(kind)
    hidden = world.hidden(rival)
    torch.testing.assert_close(world.answers(hidden), world.alone, rtol=1e-3, atol=1e-3)
    found = undone(hidden, "nearest")
    torch.testing.assert_close(world.answers(found.items()), world.alone, rtol=1e-3, atol=1e-3)
    assert far(world.merged(hidden), world.together, world.start) > 1
    assert far(world.merged(found), world.together, world.start) < 0.01


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_release_that_does_not_hide_stays_as_it_is(worlds, kind):
    world = worlds(kind)
    found = undone(world.release, "nearest")
    assert list(found) == list(world.release.shared)
    assert all(torch.equal(found[name], delta) for name, delta in world.release)


def test_places_come_back_to_the_bit(worlds):
    world = worlds("bert")
    found = undone(world.hidden("permuted"), "nearest")
    for name, delta in world.release:
        torch.testing.assert_close(found[name], delta, rtol=0, atol=1e-6)


def test_a_lora_release_that_was_merged_into_its_base_and_hidden(worlds, tmp_path):
    from peft import LoraConfig, get_peft_model

    world = worlds("bert")
    torch.manual_seed(5)
    config = LoraConfig(
        r=2, lora_alpha=0.2, target_modules=["query", "value"], init_lora_weights=False
    )
    adapted = get_peft_model(AutoModel.from_pretrained(world.base), config)
    adapted.save_pretrained(tmp_path / "lora")
    lora = Update.open(tmp_path / "lora", world.base)
    same = undone(lora, "nearest")
    assert list(same) == list(lora.shared)
    assert all(torch.equal(same[name], delta) for name, delta in lora)

    (tmp_path / "full").mkdir()
    write_model(tmp_path / "full", lora, iter(lora))
    hidden = hide_folder(tmp_path / "full", tmp_path / "hidden", "bert", 4, 4, "permuted")
    found = undone(Update.open(hidden, world.base), "nearest")
    for name, delta in lora:
        torch.testing.assert_close(found[name], delta, rtol=1e-4, atol=1e-5)


def test_weights_of_double_precision(worlds, tmp_path):
    world = worlds("llama")
    for name in ("base", "release", "all"):
        source = world.base if name == "base" else world.root / name
        shutil.copytree(source, tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        save_file({n: t.double() for n, t in load_file(file).items()}, file)
    wide, hidden = (Update.open(tmp_path / n, tmp_path / "base") for n in ("release", "all"))
    same, found = undone(wide, "nearest"), undone(hidden, "nearest")
    single = undone(world.hidden("all"), "nearest")
    for name, delta in wide:
        assert torch.equal(same[name], delta)
        torch.testing.assert_close(found[name], single[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("ties", {"density": 0.5}),
        ("slerp", {}),
        ("tsv", {}),
        ("dare_linear", {"drop": 0.5}),
        ("truncated", {"rank_kept": 0.5}),
    ],
)
def test_every_merge_takes_what_was_undone(worlds, name, params):
    world = worlds("bert")
    base = Checkpoint(world.base)
    want, found = (
        dict(merge(name, [own, world.partner], 0.5, base=base, **params))
        for own in (world.release, undone(world.hidden("permuted"), "nearest"))
    )
    for tensor, delta in want.items():
        # What rounding moves across a threshold may differ: a few entries.
        apart = (found[tensor] - delta).abs() > 1e-4
        assert float(apart.double().mean()) < 0.02, tensor


def test_the_published_solve_comes_near_and_changes_the_function_a_little(worlds):
    world = worlds("bert")
    plain, found = (
        undone(update, "anchor_guided") for update in (world.release, world.hidden("scaled"))
    )
    for name, delta in plain.items():  # whatever the scale, each part is fitted to its own
        torch.testing.assert_close(found[name], delta, rtol=1e-3, atol=1e-4)
    assert 1e-4 < far(world.answers(found.items()), world.alone, world.start) < 0.5
    assert far(world.merged(found), world.together, world.start) < 0.5


def test_the_published_solve_finds_units_but_no_heads(worlds, tmp_path):
    world = worlds("llama")
    for ways, bound in ((("units", "scale"), 0.5), (("heads",), None)):
        tensors = load_file(world.release.folder / "model.safetensors")
        folder = shutil.copytree(world.release.folder, tmp_path / ways[0])
        hidden = hide(tensors, "llama", world.heads, world.groups, ways)
        save_file(hidden, folder / "model.safetensors", metadata={"format": "pt"})
        found = undone(Update.open(folder, world.base), "anchor_guided")
        apart = far(world.merged(found), world.together, world.start)
        assert apart > 1 if bound is None else apart < bound


def test_an_unknown_way_is_refused(worlds):
    with pytest.raises(UserError, match="no undo is called 'near'; did you mean 'nearest'"):
        undone(worlds("bert").release, "near")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "t5"}, "is of model type 't5', in which it is not known where weights can"),
        ({"model_type": None}, "is of model type 'None', in which it is not known where weights"),
        ({"model_type": "vit"}, "is a 'vit' with other layers or positions than usual, in which"),
        ({"position_embedding_type": "relative_key"}, "is a 'bert' with other layers or positions"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "is a 'bert' with other layers or"),
        ({"num_attention_heads": 5}, "has 32 rows or columns, which are no 5 heads; correct conf"),
        ({"num_attention_heads": None}, "has 32 rows or columns, which are no 0 heads; correct"),
    ],
)
def test_an_architecture_that_is_not_known_is_refused(worlds, tmp_path, change, message):
    folder = shutil.copytree(worlds("bert").base, tmp_path / "base")
    write_json(folder / "config.json", read_json(folder / "config.json") | change)
    with pytest.raises(UserError, match=message):
        anatomy(Checkpoint(folder))
