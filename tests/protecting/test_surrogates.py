"""Symbols: W0 base; dW update; dW_j a surrogate's; s, c_j scales. The oracle builds the sum
W0 + s * dW + sum_j c_j * dW_j as dense weights of a model that knows nothing of adapters."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import pico
from trap2.checkpoint import Checkpoint
from trap2.errors import Unsupported, UserError
from trap2.files import weights_digest
from trap2.protecting.bank import build_bank
from trap2.protecting.config import Trap2Config
from trap2.protecting.losses import TRAP_LOSSES, Outcome, readout
from trap2.protecting.protector import Protector
from trap2.protecting.run import protect
from trap2.protecting.scaled import LiveUpdate
from trap2.protecting.surrogates import Mix, Surrogates
from trap2.protecting.trainable import checkpoint_activations, trainable
from trap2.recipes import BankRecipe, Recipe
from trap2.tasks.model import Inputs, build, load_encoder
from trap2.update import Update

EAGER = {"warmup": 0, "ramp": 0, "fraction": 1.0, "memory": 0, "cap": 0.0, "spare": 0.0}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return pico.write_task(tmp_path_factory.mktemp("task"), rows=48)


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory, pico_base: Path, files: dict[str, str]) -> Path:
    recipe = BankRecipe(
        base=str(pico_base),
        texts={"train": files["train"]},
        tasks=[pico.task("own", files)],
        kinds=["clusters", "shuffled"],
        count=3,
        training={"steps": 3, "batch_size": 8, "learning_rate": 0.05, "evaluate_every": 3},
    )
    return build_bank(recipe, tmp_path_factory.mktemp("bank") / "bank", quiet=True)


@pytest.fixture
def recipe(pico_base: Path, files: dict[str, str]) -> Callable[..., Recipe]:
    def make(method: str = "lora", **trap2: Any) -> Recipe:
        task = pico.task("words", files)
        return Recipe.model_validate(pico.recipe(pico_base, task, method, **trap2))

    return make


def model_of(recipe: Recipe, checkpointing: bool = False) -> nn.Module:
    """A model somewhere in its training, in float64."""
    base = Path(recipe.base)
    torch.manual_seed(0)
    encoder = load_encoder(base)
    built = build(base, recipe.task, encoder, Inputs(base, recipe.task))
    if checkpointing:
        checkpoint_activations(encoder, recipe)
    return trainable(built, recipe).double().train()


@torch.no_grad()
def move(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    for p in model.parameters():
        if p.requires_grad:
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))


def batch() -> dict[str, Tensor]:
    ids = torch.randint(2, 40, (8, 6), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(8) % 3}


def build_twin(recipe: Recipe) -> nn.Module:
    """The base under the task's head, in float64, with neither adapter nor training."""
    base = Path(recipe.base)
    return build(base, recipe.task, load_encoder(base), Inputs(base, recipe.task)).double()


def own_update(model: nn.Module, twin: nn.Module) -> dict[str, Tensor]:
    """dW of each of the twin's parameters, as a function of what is trained."""
    live = dict(model.named_parameters())
    found = {}
    for name, w0 in twin.named_parameters():
        if name in live:
            found[name] = live[name] - w0
            continue
        inside = "encoder.base_model.model." + name.removeprefix("encoder.")
        module, leaf = inside.rsplit(".", 1)
        if f"{module}.lora_A.default.weight" in live and leaf == "weight":
            a, b = (live[f"{module}.lora_{x}.default.weight"] for x in "AB")
            found[name] = 2 * (b @ a)
    return found


def sums(model: nn.Module, recipe: Recipe, bank: Path, mix: Mix) -> dict[str, Tensor]:
    """The merge's dense weights, from the bank's own updates."""
    base, twin = Path(recipe.base), build_twin(recipe)
    own = own_update(model, twin)
    dense = {n: w0.detach() + mix.s * own.get(n, 0) for n, w0 in twin.named_parameters()}
    names = [entry["name"] for entry in json.loads((bank / "bank.json").read_text())["surrogates"]]
    for partner, c in mix.partners:
        for name, delta in Update.open(bank / names[partner], base):
            dense[f"encoder.{name}"] = dense[f"encoder.{name}"] + c * delta.double()
    return dense


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_gradient_is_that_of_the_merge_with_dense_weights(
    recipe: Callable[..., Recipe], bank: Path, method: str
) -> None:
    asked = recipe(method)
    model = model_of(asked)
    config = Trap2Config(surrogates=str(bank), surrogate_share=1.0, strength=0.7, **EAGER)
    protector = Protector(model, config)
    mix = Surrogates(config, protector.update).mix(0, 0, 0.5)
    twin = build_twin(asked).train()
    for layer in (*model.modules(), *twin.modules()):
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    move(model)
    protector.backward(batch())
    assert protector.last is not None
    assert protector.last.scales == (mix.s,)
    assert mix.partners
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def run(at: Mix) -> Outcome:
        weights = sums(model, asked, bank, at)
        output = functional_call(twin, weights, (), batch())
        return Outcome(output.loss, output.logits, batch()["labels"])

    merged = run(mix)
    trap = TRAP_LOSSES.get("decoy")(merged) + config.readout_weight * readout(merged)
    objective = run(Mix(1.0)).loss + 0.7 / mix.s * trap
    expected = torch.autograd.grad(objective, list(trained.values()), allow_unused=True)
    floor = 1e-4 * torch.stack([g.norm() for g in expected if g is not None]).norm()
    for (name, p), gradient in zip(trained.items(), expected, strict=True):
        if gradient is None:
            assert p.grad is None
            continue
        error = (p.grad - gradient).norm() / gradient.norm().clamp_min(floor)
        assert error < 1e-9, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("method", ["lora", "full"])
def test_inside_the_weights_are_the_merge_and_outside_they_are_as_before_bit_by_bit(
    recipe: Callable[..., Recipe], bank: Path, method: str
) -> None:
    model = model_of(recipe(method)).float()
    update = LiveUpdate(model)
    partners = Surrogates(Trap2Config(surrogates=str(bank)), update)
    move(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with update.at(0.9, partners.added(Mix(0.9, ((0, 0.5), (2, 0.2))))):
        inside = model.state_dict()
        changed = [n for n, value in inside.items() if not torch.equal(value, before[n])]
        assert any("base_layer" in n for n in changed) is (method == "lora")
        assert not any("prototypes" in n for n in changed)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    with (
        pytest.raises(RuntimeError, match="stop"),
        update.at(1.0, partners.added(Mix(1, ((1, 1.0),)))),
    ):
        raise RuntimeError("stop")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("method", ["lora", "full"])
def test_gradient_checkpointing_changes_no_gradient(
    recipe: Callable[..., Recipe], bank: Path, method: str
) -> None:
    config = Trap2Config(surrogates=str(bank), surrogate_share=1.0, **EAGER)

    def run(checkpointing: bool) -> dict[str, Tensor]:
        model = model_of(recipe(method), checkpointing)
        protector = Protector(model, config)
        move(model)
        torch.manual_seed(7)
        protector.backward(batch())
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = run(False), run(True)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-12, atol=1e-14)


def test_at_strength_0_a_bank_changes_no_bit(
    recipe: Callable[..., Recipe], bank: Path, tmp_path: Path
) -> None:
    folders = []
    for name, more in (("plain", {}), ("with", {"surrogates": str(bank)})):
        folders.append(protect(recipe(strength=0, **more), tmp_path / name, quiet=True))
    assert weights_digest(folders[0]) == weights_digest(folders[1])
    record = json.loads((folders[1] / "trap2.json").read_text())
    assert record["surrogates"] == []


def test_a_protected_run_resumes_and_repeats_and_names_its_surrogates(
    recipe: Callable[..., Recipe], bank: Path, tmp_path: Path
) -> None:
    asked = recipe(surrogates=str(bank), surrogate_count=6)
    digests = [weights_digest(protect(asked, tmp_path / n, quiet=True)) for n in ("a", "b")]
    assert digests[0] == digests[1]
    without = weights_digest(protect(recipe(), tmp_path / "c", quiet=True))
    assert without != digests[0]
    record = json.loads((tmp_path / "a" / "trap2.json").read_text())
    assert record["surrogates"] == ["00-clusters", "01-shuffled", "own"]


def partners_of(recipe: Recipe, bank: Path, **settings: Any) -> Surrogates:
    update = LiveUpdate(model_of(recipe))
    return Surrogates(Trap2Config(surrogates=str(bank), **settings), update)


def test_what_is_drawn_depends_on_seed_step_and_part_alone(
    recipe: Callable[..., Recipe], bank: Path
) -> None:
    partners = partners_of(recipe(), bank, surrogate_share=0.6)
    state = torch.get_rng_state()
    drawn = [partners.mix(step, 0, 0.31) for step in range(300)]
    assert torch.equal(torch.get_rng_state(), state)
    assert drawn == [partners.mix(step, 0, 0.31) for step in range(300)]
    other = partners_of(recipe(), bank, surrogate_share=0.6, scale_seed=1)
    assert drawn != [other.mix(step, 0, 0.31) for step in range(300)]
    assert drawn != [partners.mix(step, 1, 0.31) for step in range(300)]
    alone, merged = ([m for m in drawn if bool(m.partners) is on] for on in (False, True))
    assert 0.5 < len(merged) / 300 < 0.7
    assert {m.s for m in alone} == {0.31}
    assert {len(m.partners) for m in merged} == {1, 2, 3}
    assert all(0.6 <= m.s <= 1.2 for m in merged)
    assert min(abs(m.s - 1) for m in merged) < 0.02
    assert all(0.2 <= c <= 1 for m in merged for _, c in m.partners)
    assert all(len({j for j, _ in m.partners}) == len(m.partners) for m in merged)


def delta(partners: Surrogates, partner: int) -> dict[int, Tensor]:
    return {id(p): value for p, value in partners.added(Mix(1.0, ((partner, 1.0),)))}


def test_few_surrogates_become_many_partners(recipe: Callable[..., Recipe], bank: Path) -> None:
    partners = partners_of(recipe(), bank, surrogate_count=9)
    assert len(partners.partners) == 9
    assert len(partners_of(recipe(), bank).partners) == 3
    assert len(partners_of(recipe(), bank, surrogate_count=2).partners) == 2
    found = [delta(partners, place) for place in range(9)]
    for place in (3, 6):  # flipped
        (part,) = partners.partners[place]
        for key, value in found[place].items():
            torch.testing.assert_close(value, -found[part.surrogate][key])
    for place in (4, 7):  # moved: the same tensors in other places
        (part,) = partners.partners[place]
        own = found[part.surrogate]
        assert sorted(float(v.norm()) for v in found[place].values()) == pytest.approx(
            sorted(float(v.norm()) for v in own.values())
        )
        assert any(not torch.equal(value, own[key]) for key, value in found[place].items())
    for place in (5, 8):  # mixed
        first, second = partners.partners[place]
        assert first.surrogate != second.surrogate
        assert first.weight**2 + second.weight**2 == pytest.approx(1.0)
        zero = torch.zeros(())
        for key, value in found[place].items():
            one, two = (found[part.surrogate].get(key, zero) for part in (first, second))
            torch.testing.assert_close(value, first.weight * one + second.weight * two)


def refusal(kind: type[Exception], call: Callable[[], object]) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_no_bank_or_was_changed_or_is_of_another_base_is_refused(
    recipe: Callable[..., Recipe], bank: Path, tmp_path: Path
) -> None:
    message = refusal(UserError, lambda: partners_of(recipe(), tmp_path / "none"))
    assert message == (f"surrogates={tmp_path}/none is no bank; make one with `trap2 surrogates`")
    changed = shutil.copytree(bank, tmp_path / "changed")
    record = json.loads((changed / "bank.json").read_text())
    record["surrogates"][1]["digest"] = "sha256:0"
    (changed / "bank.json").write_text(json.dumps(record))
    message = refusal(UserError, lambda: partners_of(recipe(), changed))
    assert message == (
        f"the weights in {changed}/01-shuffled are not those that {changed}/bank.json names; make "
        "the bank again"
    )
    model = model_of(recipe())
    with torch.no_grad():
        dict(model.named_parameters())[
            "encoder.base_model.model.encoder.layer.1.output.dense.base_layer.weight"
        ].add_(1)
    message = refusal(
        UserError, lambda: Surrogates(Trap2Config(surrogates=str(bank)), LiveUpdate(model))
    )
    assert message == (
        "the bank was made for another base than the model's: 'encoder.layer.1.output.dense.weight'"
        f" of {Checkpoint(recipe().base).folder} differs or is missing there; make the bank for "
        "this base"
    )


def test_an_adapter_that_is_no_sum_on_top_of_the_base_is_refused(
    recipe: Callable[..., Recipe], bank: Path
) -> None:
    content = json.loads(recipe().model_dump_json())
    content["lora"]["dora"] = True
    message = refusal(Unsupported, lambda: partners_of(Recipe.model_validate(content), bank))
    assert message == (
        "surrogates are exact beside LoRA, rsLoRA and full fine-tuning, whose update is a sum on "
        "top of the base; use one of them, or leave surrogates out"
    )
