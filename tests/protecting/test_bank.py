"""`trap2 surrogates`: what a bank holds, and that it is whole, repeatable and gone on with."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pico
from trap2.checkpoint import Checkpoint
from trap2.errors import UserError
from trap2.files import weights_digest
from trap2.protecting import bank
from trap2.protecting.bank import build_bank
from trap2.recipes import BankRecipe
from trap2.update import Update


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return pico.write_task(tmp_path_factory.mktemp("task"), rows=48)


@pytest.fixture
def recipe(pico_base: Path, files: dict[str, str]) -> Callable[..., BankRecipe]:
    def make(**changes: Any) -> BankRecipe:
        training = {"steps": 2, "batch_size": 8, "learning_rate": 0.05, "evaluate_every": 2}
        content = {
            "base": str(pico_base),
            "texts": {"train": files["train"]},
            "tasks": [pico.task("own", files)],
            "count": 5,
            "training": training,
        }
        return BankRecipe.model_validate({**content, **changes})

    return make


def contents(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "bank.json").read_text())


def test_a_bank_holds_ordinary_releases_and_says_how_each_was_made(
    recipe: Callable[..., BankRecipe], pico_base: Path, tmp_path: Path
) -> None:
    out = build_bank(recipe(), tmp_path / "bank", quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["bank"]
    record = contents(out)
    base = Checkpoint(pico_base)
    assert (record["base"], record["base_digest"]) == (str(pico_base), base.digest)
    entries = record["surrogates"]
    kinds = ["clusters", "words", "shuffled", "own", "clusters"]
    assert [entry["kind"] for entry in entries] == kinds
    assert [entry["task"] for entry in entries] == [
        *("00-clusters", "01-words", "02-shuffled", "own", "04-clusters")
    ]
    shared = []
    for entry in entries:
        folder = out / entry["name"]
        update = Update.open(folder, pico_base)
        assert entry["digest"] == weights_digest(folder)
        made = json.loads((folder / "trap2.json").read_text())
        assert (made["seed"], made["trap2"]["strength"]) == (entry["seed"], 0)
        assert (made["surrogates"], made["recipe"]["lora"]["r"]) == ([], entry["r"])
        shared.append(update.shared)
    assert len({entry["seed"] for entry in entries}) == 5
    assert len({entry["r"] for entry in entries}) > 1
    assert len({*shared}) > 1


def test_a_bank_that_was_cut_short_is_gone_on_with_and_ends_in_the_same_weights(
    recipe: Callable[..., BankRecipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe(count=3, tasks=[])
    whole = contents(build_bank(asked, tmp_path / "whole", quiet=True))
    real, made = bank.protect, []

    def dies(one: Any, out: Path, **how: Any) -> Path:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(out.name)
        return real(one, out, **how)

    monkeypatch.setattr(bank, "protect", dies)
    with pytest.raises(KeyboardInterrupt):
        build_bank(asked, tmp_path / "bank", quiet=True)
    assert not (tmp_path / "bank").exists()
    with pytest.raises(UserError) as caught:
        build_bank(recipe(count=4, tasks=[]), tmp_path / "bank", quiet=True)
    assert str(caught.value) == (
        f"{tmp_path}/bank.partial holds an unfinished bank of another recipe; go on with that one, "
        "or pass --overwrite to start again"
    )
    made.clear()
    assert contents(build_bank(asked, tmp_path / "bank", quiet=True)) == whole
    assert made == ["02-shuffled"]


def test_a_bank_is_replaced_only_when_told_to(
    recipe: Callable[..., BankRecipe], tmp_path: Path
) -> None:
    asked = recipe(count=1)
    out = build_bank(asked, tmp_path / "bank", quiet=True)
    with pytest.raises(UserError, match=r"exists already; pass --overwrite or choose another"):
        build_bank(asked, out, quiet=True)
    first = contents(out)
    second = contents(build_bank(recipe(count=1, seed=1), out, overwrite=True, quiet=True))
    assert second["surrogates"][0]["seed"] == 1000
    assert second["surrogates"][0]["digest"] != first["surrogates"][0]["digest"]


def test_without_texts_the_bank_is_made_of_labelled_sets_alone(
    recipe: Callable[..., BankRecipe], tmp_path: Path
) -> None:
    out = build_bank(recipe(texts=None, count=2), tmp_path / "bank", quiet=True)
    assert [entry["kind"] for entry in contents(out)["surrogates"]] == ["own", "own"]
    assert sorted(path.name for path in out.iterdir()) == [
        *("00-own", "01-own", "bank.json", "recipe.json")
    ]
