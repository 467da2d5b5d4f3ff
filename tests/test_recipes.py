"""Recipes and audits: what is accepted, and one line for whatever is not."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import pico
from trap2.errors import UserError
from trap2.protecting.config import Trap2Config
from trap2.recipes import AuditSpec, BankRecipe, LoraSpec, Recipe, TrainingSpec, config_from, load

TASK: dict[str, Any] = {"name": "t", "data": {"train": "train.csv"}, "classes": ["a", "b"]}
RECIPE: dict[str, Any] = {"base": "base", "task": TASK}
AUDIT: dict[str, Any] = {
    "base": "base",
    "release": {"path": "ours", "task": TASK},
    "partners": [{"path": "theirs", "task": TASK | {"name": "u"}}],
}


def changed(content: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy with one key, given as a.b.0.c, set."""
    copy: Any = json.loads(json.dumps(content))
    *parents, last = key.split(".")
    place = copy
    for part in parents:
        place = place[int(part)] if part.isdecimal() else place.setdefault(part, {})
    place[last] = value
    return dict(copy)


def refusal(path: Path, kind: Any, content: Any, changes: list[str] | None = None) -> str:
    if isinstance(content, dict):
        pico.write_yaml(path, content)
    with pytest.raises(UserError) as caught:
        load(kind, path, changes)
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def test_the_shortest_recipe_has_the_defaults(tmp_path: Path) -> None:
    recipe = load(Recipe, pico.write_yaml(tmp_path / "r.yaml", RECIPE))
    assert recipe.method == "lora"
    assert recipe.lora == LoraSpec()
    assert recipe.training == TrainingSpec()
    assert recipe.trap2 == {}
    assert config_from(recipe.trap2, Trap2Config) == Trap2Config()


def test_all_defaults_written_out_read_the_same(tmp_path: Path) -> None:
    for kind, content in ((Recipe, RECIPE), (AuditSpec, AUDIT)):
        short = load(kind, pico.write_yaml(tmp_path / "short.yaml", content))
        written = pico.write_yaml(tmp_path / "long.yaml", short.model_dump(mode="json"))
        assert load(kind, written) == short
        assert kind.model_validate_json(short.model_dump_json()) == short


def test_every_field_of_the_trap_can_stand_in_a_recipe(tmp_path: Path) -> None:
    fields = {name: getattr(Trap2Config(), name) for name in Trap2Config.__dataclass_fields__}
    written = pico.write_yaml(tmp_path / "r.yaml", RECIPE | {"trap2": fields})
    assert config_from(load(Recipe, written).trap2, Trap2Config) == Trap2Config()


@pytest.mark.parametrize(
    ("kind", "content", "key", "suggested"),
    [
        (Recipe, RECIPE, "sed", "seed"),
        (Recipe, RECIPE, "task.clases", "classes"),
        (Recipe, RECIPE, "task.data.trian", "train"),
        (Recipe, RECIPE, "lora.alpa", "alpha"),
        (Recipe, RECIPE, "training.step", "steps"),
        (AuditSpec, AUDIT, "partner", "partners"),
        (AuditSpec, AUDIT, "release.pth", "path"),
        (AuditSpec, AUDIT, "partners.0.task.data.hubb", "hub"),
        (AuditSpec, AUDIT, "attacker.coefficient", "coefficients"),
    ],
)
def test_an_unknown_key_gets_a_suggestion_at_every_level(
    tmp_path: Path, kind: Any, content: dict[str, Any], key: str, suggested: str
) -> None:
    message = refusal(tmp_path / "r.yaml", kind, changed(content, key, 1))
    assert message.startswith(f"unknown key '{key}'; did you mean '{suggested}'? known: ")
    assert suggested in message.split("known: ")[1].split(", ")


def test_a_preset_of_the_trap_is_changed_by_the_keys_beside_it() -> None:
    config = config_from({"preset": "paper", "strength": 0.1}, Trap2Config)
    assert config == Trap2Config.preset("paper", strength=0.1)
    assert config_from({"preset": "default"}, Trap2Config) == Trap2Config()
    with pytest.raises(UserError, match=r"^no preset is called 'papr'; did you mean 'paper'"):
        config_from({"preset": "papr"}, Trap2Config)


def test_an_unknown_key_of_the_trap_gets_a_suggestion() -> None:
    with pytest.raises(UserError) as caught:
        config_from({"strenght": 1}, Trap2Config)
    assert str(caught.value).startswith(
        "unknown key 'trap2.strenght'; did you mean 'strength'? known: strength, loss, "
    )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("training.steps", "many", "training.steps='many' is not acceptable: input should be a"),
        ("training.steps", 0, "training.steps=0 is not acceptable: input should be greater than"),
        ("training.steps", 1.5, "training.steps=1.5 is not acceptable: input should be a valid"),
        ("training", [1], "training=[1] is not acceptable: input should be a valid dictionary"),
        ("trap2", None, "trap2=None is not acceptable: input should be a valid dictionary"),
        ("method", "dora", "method='dora' is not acceptable: input should be 'lora' or 'full'"),
        ("task.classes", ["a"], "task: one class is no choice; name two or more"),
        ("task.classes", [], "task: kind text needs classes; add their names"),
        ("task.data", None, "task: kind text needs data; add it"),
        ("task.limit", {"trian": 3}, "task.limit.trian"),
        ("task.limit", {"train": 0}, "task.limit.train=0 is not acceptable: input should be"),
        ("task.classes", ["a", "a"], "task: a class name stands twice; names must differ"),
        ("task.descriptions", ["a"], "task: 1 descriptions for 2 classes; give one each"),
        ("task.data.hub", "x", "task.data: give exactly one source: files (train, ...), image"),
        ("task.data", {}, "task.data: give exactly one source: files (train, ...), imagefolder"),
        ("task.name", "", "task.name='' is not acceptable: string should have at least 1"),
        ("task.name", "x\ny" * 200, "task.name="),
        ("base", {"a": "b"}, "base={'a': 'b'} is not acceptable: input should be a valid string"),
        ("seed", -1, "seed=-1 is not acceptable: input should be greater than or equal to 0"),
        ("lora.targets", 3, "lora.targets"),
        ("trap2", {"strength": [1]}, "trap2.strength"),
    ],
)
def test_a_wrong_value_is_named_with_its_reason(
    tmp_path: Path, key: str, value: Any, message: str
) -> None:
    found = refusal(tmp_path / "r.yaml", Recipe, changed(RECIPE, key, value))
    assert found.startswith(message)


def test_descriptions_are_for_texts_only(tmp_path: Path) -> None:
    content = changed(changed(RECIPE, "task.kind", "image"), "task.descriptions", ["x", "y"])
    assert refusal(tmp_path / "r.yaml", Recipe, content) == (
        "task: descriptions need kind: text; remove them to train a classifier head"
    )


def test_task_names_of_an_audit_differ(tmp_path: Path) -> None:
    assert refusal(tmp_path / "r.yaml", AuditSpec, changed(AUDIT, "partners.0.task.name", "t")) == (
        "settings: task names must differ, got t, t; rename one"
    )


@pytest.mark.parametrize("key", ["base", "task", "task.name"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    content = json.loads(json.dumps(RECIPE))
    place = content["task"] if "." in key else content
    del place[key.split(".")[-1]]
    assert refusal(tmp_path / "r.yaml", Recipe, content) == f"key '{key}' is missing; add it"


def test_several_problems_are_counted(tmp_path: Path) -> None:
    content = changed(changed(RECIPE, "seed", -1), "method", "x")
    assert refusal(tmp_path / "r.yaml", Recipe, content).endswith("; correct it (and 1 more)")


@pytest.mark.parametrize("text", ["", "# only words\n", "- a\n- b\n", "just text"])
def test_a_file_without_settings_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    assert refusal(path, Recipe, None) == (
        f"{path} holds no settings; start from the examples in the README"
    )


@pytest.mark.parametrize("content", [b"a: [1\nb: 2", b"a: b: c", b"\xff\xfe\xfa", b"a: 2026-13-45"])
def test_bad_yaml_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    message = refusal(path, Recipe, None)
    assert message.startswith(f"{path} is not valid YAML: ")
    assert message.endswith("; mend that line")


def test_yaml_cannot_make_objects(tmp_path: Path) -> None:
    path, marker = tmp_path / "r.yaml", tmp_path / "made"
    path.write_text(f"base: !!python/object/apply:pathlib.Path.touch [{marker}]")
    assert "is not valid YAML" in refusal(path, Recipe, None)
    assert not marker.exists()


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "no.yaml", Recipe, None) == (
        f"cannot read {tmp_path / 'no.yaml'}: No such file or directory; check the path"
    )
    assert refusal(tmp_path, Recipe, None).startswith(f"cannot read {tmp_path}: Is a directory")


def test_relative_paths_are_relative_to_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    (tmp_path / "deep" / "base").mkdir(parents=True)
    recipe = load(Recipe, pico.write_yaml(tmp_path / "deep" / "r.yaml", RECIPE))
    assert recipe.task.data.train == tmp_path / "deep" / "train.csv"
    assert recipe.base == str(tmp_path / "deep" / "base")
    audit = load(AuditSpec, pico.write_yaml(tmp_path / "a.yaml", AUDIT | {"control": "../control"}))
    assert audit.release.path == tmp_path / "ours"
    assert audit.partners[0].path == tmp_path / "theirs"
    assert audit.control == tmp_path / ".." / "control"
    assert audit.base == "base"  # no such folder there: an id of the Hub
    absolute = changed(RECIPE, "task.data.train", "/data/train.csv")
    assert load(Recipe, pico.write_yaml(tmp_path / "r.yaml", absolute)).task.data.train == Path(
        "/data/train.csv"
    )


def test_a_recipe_read_by_a_relative_path_gives_absolute_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pico.write_yaml(tmp_path / "r.yaml", RECIPE)
    monkeypatch.chdir(tmp_path)
    assert load(Recipe, Path("r.yaml")).task.data.train == tmp_path / "train.csv"


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        yaml.safe_dump(RECIPE)
        + "training: {learning_rate: 1e-3, weight_decay: 1.0e-2}\ntrap2: {strength: 1e-1}\n"
    )
    recipe = load(Recipe, path, ["trap2.band=5e-2", "training.max_grad_norm=2"])
    assert recipe.training.learning_rate == 0.001
    assert recipe.training.weight_decay == 0.01
    assert recipe.training.max_grad_norm == 2.0
    config = config_from(recipe.trap2, Trap2Config)
    assert config.strength == 0.1
    assert config.band == 0.05


def test_settings_are_changed_from_the_command_line(tmp_path: Path) -> None:
    path = pico.write_yaml(tmp_path / "r.yaml", RECIPE)
    recipe = load(
        Recipe,
        path,
        [
            "training.steps=7",
            "trap2.strength=0",
            "trap2.loss=hinge",
            "task.classes=[x, y, z]",
            "task.classes.2=w",
            "task.data.train=other.csv",
            "lora.targets=[query]",
            "task.name=a=b",
        ],
    )
    assert recipe.training.steps == 7
    assert recipe.trap2 == {"strength": 0, "loss": "hinge"}
    assert recipe.task.classes == ["x", "y", "w"]
    assert recipe.task.data.train == tmp_path / "other.csv"
    assert recipe.lora.targets == ["query"]
    assert recipe.task.name == "a=b"
    audit = load(
        AuditSpec,
        pico.write_yaml(tmp_path / "a.yaml", AUDIT),
        ["partners.0.path=there", "partners.0.task.limit.test=5", "attacker.t3_values=[0, 1]"],
    )
    assert audit.partners[0].path == tmp_path / "there"
    assert audit.partners[0].task.limit == {"test": 5}
    assert audit.attacker.t3_values == [0.0, 1.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training.steps", "--set training.steps is not of the form a.b=c; write for example"),
        ("=3", "--set =3 is not of the form a.b=c; write for example training.steps=300"),
        ("base.x=1", "--set base.x=1: 'base' is not a group of settings, or a list so long; check"),
        ("base.x.y=1", "--set base.x.y=1: 'base.x' is not a group of settings, or a list so long"),
        ("task.classes.9=z", "--set task.classes.9=z: 'task.classes' is not a group of settings,"),
        ("task.classes.x=z", "--set task.classes.x=z: 'task.classes' is not a group of settings"),
        ("seed=[1", "--set seed=[1: the value is not valid YAML; quote it"),
        ("training.stps=3", "unknown key 'training.stps'; did you mean 'steps'? known: steps, "),
        ("seed=x", "seed='x' is not acceptable: input should be a valid integer"),
    ],
)
def test_a_bad_change_is_refused(tmp_path: Path, change: str, message: str) -> None:
    assert refusal(tmp_path / "r.yaml", Recipe, RECIPE, [change]).startswith(message)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("warmup", "soon", "trap2.warmup='soon' is no int; correct it"),
        ("warmup", 1.5, "trap2.warmup=1.5 is no int; correct it"),
        ("ramp", float("inf"), "trap2.ramp=inf is no int; correct it"),
        ("strength", "strong", "trap2.strength='strong' is no float; correct it"),
        ("strength", -1, "strength=-1.0 is out of range; it must be "),
        ("strength", float("nan"), "strength=nan is out of range; it must be "),
        ("loss", "unlikelyhood", "no trap loss is called 'unlikelyhood'; did you mean 'unlikeli"),
        ("weighting", "cubic", "weighting 'cubic' is unknown; use one of inverse, inverse_sqrt"),
        ("low", 2, "scale range low=2.0, band=0.1, high=1.6 is empty; it needs 0 < low < 1"),
    ],
)
def test_a_wrong_setting_of_the_trap_is_named(key: str, value: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        config_from({key: value}, Trap2Config)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_settings_become_the_type_of_their_field() -> None:
    @dataclass
    class Config:
        count: int = 0
        share: float = 0.0
        name: str = ""

    config = config_from({"count": 2.0, "share": "1e-3", "name": 3}, Config)
    assert config == Config(2, 0.001, "3")
    assert isinstance(config.count, int)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["base", "task", "seed", "trap2", "x"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@given(content=st.dictionaries(st.sampled_from(["base", "task", "lora", "trap2", "y"]), ANYTHING))
def test_no_content_ends_in_anything_but_one_line(
    content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = pico.write_yaml(tmp_path_factory.mktemp("any") / "r.yaml", content)
    for kind in (Recipe, AuditSpec):
        with pytest.raises(UserError) as caught:
            load(kind, path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "settings: no rows to train on; give texts, with kinds, or tasks"),
        (
            {"texts": {"train": "t.csv"}, "kinds": []},
            "settings: no rows to train on; give texts, with kinds, or tasks",
        ),
        (
            {"texts": {"train": "t.csv"}, "tasks": [TASK | {"name": "words"}]},
            "settings: kinds and task names must differ, got clusters, words, shuffled, words",
        ),
        (
            {"tasks": [TASK], "cuont": 3},
            "unknown key 'cuont'; did you mean 'count'? known: base, texts, kinds, tasks, count, "
            "rows, max_length, training, seed",
        ),
    ],
)
def test_a_bank_without_rows_or_with_names_that_clash_is_refused(
    tmp_path: Path, content: dict[str, Any], message: str
) -> None:
    path = pico.write_yaml(tmp_path / "bank.yaml", {"base": "base", **content})
    with pytest.raises(UserError) as caught:
        load(BankRecipe, path)
    assert str(caught.value) == f"{path}: {message}"


def test_the_bank_of_a_recipe_lies_beside_its_file(tmp_path: Path) -> None:
    recipe = {**RECIPE, "trap2": {"surrogates": "bank"}}
    path = pico.write_yaml(tmp_path / "recipe.yaml", recipe)
    assert load(Recipe, path).trap2["surrogates"] == str(tmp_path / "bank")
    assert load(Recipe, path, ["trap2.surrogates=''"]).trap2["surrogates"] == ""
