"""Keys by content: what changes the logits changes the key, and nothing else does."""

import json
import re
import shutil
import sys
from dataclasses import replace
from types import ModuleType

import pytest
from safetensors.torch import load_file, save_file

from trap2.attacks.attack import ATTACKS, attack
from trap2.auditing import contents
from trap2.auditing.arena import CONTROL, RELEASE, Arena, Mixture
from trap2.errors import UserError
from trap2.recipes import AuditSpec

MIXTURE = Mixture("ties", (RELEASE, "b"), (0.5, 0.7), (("density", 0.2),))


def contents_of(settings):
    return Arena(AuditSpec.model_validate(settings)).contents


def key(settings, mixture=MIXTURE, member=RELEASE, split="test"):
    return contents_of(settings).of(mixture, member, split).key


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_every_evaluation_has_a_key_of_its_own_and_always_the_same(arenas, shelf, kind):
    asked = [
        (MIXTURE, RELEASE, "test"),
        (MIXTURE, RELEASE, "validation"),
        (MIXTURE, "b", "test"),
        (
            Mixture("ties_sum", *(MIXTURE.members, MIXTURE.coefficients, MIXTURE.params)),
            "b",
            "test",
        ),
        (Mixture("ties", MIXTURE.members, (0.7, 0.5), MIXTURE.params), "b", "test"),
        (Mixture("ties", ("b", RELEASE), (0.5, 0.7), MIXTURE.params), "b", "test"),
        (Mixture("ties", (CONTROL, "b"), (0.5, 0.7), MIXTURE.params), "b", "test"),
        (Mixture("ties", MIXTURE.members, (0.5, 0.7), (("density", 0.3),)), "b", "test"),
    ]
    keys = [arenas[kind].contents.of(*question).key for question in asked]
    assert len(dict.fromkeys(keys)) == len(asked)
    again = contents_of(shelf.audit(kind))
    assert [again.of(*question).key for question in asked] == keys


def test_names_of_members_and_tasks_are_no_part_of_a_key(arenas, shelf):
    swapped = shelf.audit("lora")
    swapped["release"]["path"], swapped["control"] = swapped["control"], swapped["release"]["path"]
    swapped["partners"][0]["task"]["name"] = "another"
    mixture = Mixture("ties", (CONTROL, "another"), *(MIXTURE.coefficients, MIXTURE.params))
    assert (
        key(swapped, mixture, CONTROL) == arenas["lora"].contents.of(MIXTURE, RELEASE, "test").key
    )


def other_weights(settings, folder):
    copy = shutil.copytree(settings["release"]["path"], folder / "copy")
    settings["release"]["path"] = str(copy)
    tensors = load_file(copy / "adapter_model.safetensors")
    save_file({n: 2 * t for n, t in tensors.items()}, copy / "adapter_model.safetensors")


def other_alpha(settings, folder):
    copy = shutil.copytree(settings["partners"][0]["path"], folder / "copy")
    settings["partners"][0]["path"] = str(copy)
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 9}))


def other_tokenizer(settings, folder):
    copy = shutil.copytree(settings["base"], folder / "copy")
    settings["base"] = str(copy)
    tokenizer = (copy / "tokenizer.json").read_text()
    (copy / "tokenizer.json").write_text(tokenizer.replace('"w1":', '"v1":'))


def set_task(**changes):
    def change(settings, folder):
        settings["release"]["task"].update(changes)

    return change


def fewer_rows(settings, folder):
    settings["attacker"]["test_rows"] = 20


def other_draw(settings, folder):
    settings["seed"] = 4


CHANGES = [
    (other_weights, "copy"),
    (other_alpha, "copy"),
    (other_tokenizer, "copy"),
    (set_task(max_length=5), "the test rows of task 'a'"),
    (set_task(temperature=7.0), "the head of .*/release for task 'a'"),
    (set_task(descriptions=["w1 w2", "w3", "w4"]), "the head of .*/release for task 'a'"),
    (fewer_rows, "the test rows of task 'a'"),
    (other_draw, "the test rows of task 'a'"),
]


@pytest.mark.parametrize(("change", "place"), CHANGES)
def test_whatever_changes_the_logits_changes_the_key(arenas, shelf, tmp_path, change, place):
    before = arenas["lora"].contents.of(MIXTURE, RELEASE, "test")
    settings = shelf.audit("lora")
    change(settings, tmp_path)
    after = contents_of(settings).of(MIXTURE, RELEASE, "test")
    assert after.key != before.key
    changed = [name for name, digest in after.places.items() if before.places.get(name) != digest]
    assert any(re.search(f"{place}$", name) for name in changed)
    assert len(changed) < len(after.places)


SEEING = Mixture("fisher", (RELEASE, "b"), (0.5, 0.5))


def other_sentence(settings, folder):
    settings["partners"][0]["task"]["descriptions"] = ["w1 w2", "w3", "w4"]


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda settings, folder: settings["attacker"].update(unlabelled_rows=5), "first 5 valid"),
        (lambda settings, folder: settings["partners"][0]["task"].update(max_length=5), "'b', unl"),
        (other_sentence, "the head of .* for task 'b'"),
    ],
)
def test_an_attack_that_looks_at_rows_has_every_members_rows_and_head_in_its_key(
    arenas, shelf, tmp_path, change, place
):
    settings = shelf.audit("lora")
    change(settings, tmp_path)
    changed = contents_of(settings)
    before = arenas["lora"].contents
    assert before.of(SEEING, RELEASE, "test").key != changed.of(SEEING, RELEASE, "test").key
    assert any(re.search(place, name) for name in changed.of(SEEING, RELEASE, "test").places)
    blind = before.of(MIXTURE, RELEASE, "test")
    assert blind.key == changed.of(MIXTURE, RELEASE, "test").key
    assert not any("unlabelled" in name for name in blind.places)


def test_labels_are_no_part_of_what_an_attack_sees(arenas):
    member, seen = arenas["lora"].members["b"], []
    for labels in (member.rows["validation"].labels, member.rows["validation"].labels[::-1]):
        rows = {**member.rows, "validation": replace(member.rows["validation"], labels=labels)}
        found = contents.Contents(arenas["lora"].base.folder, "sha256:0")
        found.add("b", member.update, member.task, rows, 8)
        seen.append((found._inputs["unlabelled", "b"], found._inputs["rows", "b", "validation"]))
    assert seen[0][0] == seen[1][0]
    assert seen[0][1] != seen[1][1]


def test_another_precision_is_another_key(arenas, shelf):
    settings = shelf.audit("lora")
    settings["attacker"].update(precision="bfloat16")
    changed = contents_of(settings).of(MIXTURE, RELEASE, "test")
    assert changed.key != arenas["lora"].contents.of(MIXTURE, RELEASE, "test").key


def test_another_head_is_another_key(arenas):
    known = arenas["full"].contents
    base = Mixture("task_arithmetic", ("b",), (1.0,))
    assert known.of(base, RELEASE, "test").key != known.of(base, CONTROL, "test").key


def test_every_place_of_an_evaluation_is_among_those_of_the_audit(arenas):
    known = arenas["lora"].contents
    places = known.places(["ties", "slerp"])
    assert known.of(MIXTURE, "b", "test").places.items() <= places.items()
    assert "libraries" in places
    assert any(name.startswith("the validation rows of task 'b'") for name in places)


def test_images_are_told_apart_by_their_pixels(pico_images):
    from trap2.recipes import TaskSpec
    from trap2.tasks.data import load_rows

    task = TaskSpec.model_validate(
        {
            "name": "colours",
            "kind": "image",
            "data": {"imagefolder": str(pico_images)},
            "classes": ["blue", "green", "red"],
        }
    )
    rows = load_rows(task, "validation")
    same, fewer = load_rows(task, "validation"), rows.first(3)
    assert contents._row_digest(rows, task) == contents._row_digest(same, task)
    assert contents._row_digest(rows, task) != contents._row_digest(fewer, task)
    same.inputs[0].putpixel((0, 0), (1, 2, 3))
    assert contents._row_digest(rows, task) != contents._row_digest(same, task)


def test_the_code_of_an_attack_is_its_module_and_what_that_computes_with(monkeypatch):
    def read(module):
        asked.append(module.__name__)
        return real(module)

    asked, real = [], contents.inspect.getsource
    monkeypatch.setattr(contents.inspect, "getsource", read)
    contents._code.cache_clear()
    contents._code("della")
    assert {"trap2.attacks.della", "trap2.attacks.dare", "trap2.attacks.ties"} <= {*asked}
    assert {"trap2.attacks.live", "trap2.tasks.model", "trap2.update"} <= {*asked}
    assert not {"trap2.attacks.attack", "trap2.recipes", "trap2.attacks.slerp"} & {*asked}
    other = contents._code("slerp")
    monkeypatch.setattr(contents.inspect, "getsource", lambda module: real(module) + "\n# x")
    assert contents._code("slerp") == other  # once a process
    contents._code.cache_clear()
    assert contents._code("slerp") != other
    contents._code.cache_clear()


def test_an_attack_without_source_is_refused(monkeypatch):
    def typed(updates, coefficients):
        raise AssertionError

    typed.__module__ = "typed_in"
    monkeypatch.setitem(sys.modules, "typed_in", ModuleType("typed_in"))
    monkeypatch.setattr(ATTACKS, "_entries", dict(ATTACKS._entries))
    attack("typed", paper="none")(typed)
    with pytest.raises(UserError, match="'typed' was defined where its source cannot be read, so"):
        contents._code("typed")
