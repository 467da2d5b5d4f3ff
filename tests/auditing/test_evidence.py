"""What the checks weigh, gathered from real pico releases."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from torch import nn

from trap2.attacks.attack import load_attacks
from trap2.auditing import evidence
from trap2.auditing.arena import Arena
from trap2.auditing.checks import LOGIT_GAP
from trap2.auditing.evidence import differences, gather, recipe_of, release_record
from trap2.auditing.grid import tried
from trap2.errors import UserError
from trap2.recipes import AttackerSpec, AuditSpec

KINDS = pytest.mark.parametrize("kind", ["lora", "full"])
RECIPE = {"base": "b", "task": {"name": "t", "limit": {}}, "trap2": {"strength": 0.3}, "seed": 0}
PLAIN = {"recipe": {**RECIPE, "trap2": {"strength": 0}}, "trap2": {"strength": 0.0}}


@KINDS
def test_a_control_is_trained_alike_and_both_load_as_their_users_load_them(reports, kind):
    found = reports[kind].evidence
    assert found.control_differs == []
    assert found.surrogates == []
    assert found.batch_norm_layers == 0
    assert set(found.reload_gap) == {"release", "control"}
    assert all(0 <= gap < 1e-5 for gap in found.reload_gap.values())
    assert found.grids == {
        "task_arithmetic": {"coefficient": [0.0, 0.5, 1.0]},
        "slerp": {"place": [1.0, 0.5, 0.0]},
    }


@KINDS
def test_the_floors_of_partners_are_measured(reports, arenas, kind):
    known, arena = reports[kind].references, arenas[kind]
    base = arena.evaluate(arena.alone("release", 0.0), "b", "test").accuracy
    assert known.partners_base == {"b": base}
    labels = arena.members["b"].evaluators["test"].labels.tolist()
    assert known.partners_chance["b"] == pytest.approx(max(map(labels.count, range(3))) / 24)


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({}, []),
        ({"trap2": {"strength": 0, "loss": "hinge"}}, []),
        ({"seed": 1, "task": {"name": "u", "limit": {}}}, ["task.name", "seed"]),
        ({"task": {"name": "t", "limit": {"train": 5}}}, ["task.limit.train"]),
    ],
)
def test_recipes_are_compared_key_by_key(changes, keys):
    control = {**PLAIN, "recipe": {**PLAIN["recipe"], **changes}}
    assert differences({"recipe": RECIPE}, control) == keys


def test_a_recipe_is_kept_by_key_and_as_words():
    assert recipe_of({"recipe": RECIPE}) == {
        "base": '"b"',
        "task.name": '"t"',
        "trap2.strength": "0.3",
        "seed": "0",
    }
    assert recipe_of({"recipe": {"x": float("nan"), "y": None}}) == {"x": "NaN", "y": "null"}
    assert recipe_of({"recipe": "none"}) == recipe_of({}) == {}


def test_a_control_with_a_trap_is_none():
    for trap in ({"strength": 0.1}, {}, None):
        assert differences({"recipe": RECIPE}, {**PLAIN, "trap2": trap}) == ["trap2.strength"]


@pytest.mark.parametrize("record", [{}, {"recipe": None}, {"recipe": ["base"]}])
def test_releases_that_do_not_say_how_they_were_made_are_not_compared(record):
    assert differences(record, PLAIN) is None
    assert differences({"recipe": RECIPE}, record) is None


def test_every_attack_says_what_it_tries():
    spec = AttackerSpec(grids={"ties": {"density": [0.3]}}, coefficients={"ties": [0.5, 1.0]})
    assert tried("ties", spec) == {"coefficient": [0.5, 1.0], "density": [0.3]}
    assert tried("dare_ties", spec)["drop"] == [0.1, 0.5, 0.9]
    for name in load_attacks():
        assert all(tried(name, spec).values())


@pytest.fixture
def copied(shelf, tmp_path):
    """An audit of a release that may be changed, without its control."""
    release = shutil.copytree(shelf.release("lora", "release"), tmp_path / "release")
    settings = shelf.audit("lora")
    settings["release"]["path"] = str(release)
    del settings["control"]
    return release, AuditSpec.model_validate(settings)


def test_what_a_release_says_of_itself_is_read(copied):
    release, spec = copied
    record = release_record(release)
    for said, read in ((["mpqa", 3], ["mpqa", "3"]), ("mpqa", []), (None, [])):
        (release / "trap2.json").write_text(json.dumps({**record, "surrogates": said}))
        assert gather(Arena(spec)).surrogates == read
    (release / "trap2.json").unlink()
    found = gather(Arena(spec))
    assert (found.surrogates, found.control_differs) == ([], None)


def test_a_path_that_leaves_tensors_out_is_seen(copied):
    release, spec = copied
    arena = Arena(spec)
    weights = load_file(release / "adapter_model.safetensors")
    first = next(name for name in weights if "lora_B" in name)
    save_file({**weights, first: weights[first] * 0}, release / "adapter_model.safetensors")
    assert gather(arena).reload_gap["release"] > LOGIT_GAP


def test_a_release_that_cannot_be_loaded_or_gives_no_numbers_has_no_gap(copied, monkeypatch):
    _, spec = copied
    arena = Arena(spec)

    def refuse(*args):
        raise UserError("cannot load")

    monkeypatch.setattr(evidence, "load_release", refuse)
    assert gather(arena).reload_gap == {"release": None}


def test_only_batch_norm_with_running_statistics_counts(copied):
    _, spec = copied
    arena = Arena(spec)
    arena.encoder.more = nn.ModuleList(
        [nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.BatchNorm1d(2, track_running_stats=False)]
    )
    assert gather(arena).batch_norm_layers == 2
