"""The arena: exact merges on one live base, each model under its own head, clear refusals."""

import shutil

import pytest
import torch
from torch.nn import functional as F

import pico
from attacks.hiding import hide_folder
from auditing.shelf import Shelf
from trap2.auditing.arena import CONTROL, RELEASE, Arena, Mixture
from trap2.errors import UserError
from trap2.progress import Progress
from trap2.recipes import AuditSpec, TaskSpec
from trap2.tasks.data import load_rows

ALONE = [
    Mixture("task_arithmetic", (RELEASE,), (1.0,)),
    Mixture("ties", (RELEASE,), (1.0,), (("density", 1.0),)),
    Mixture("dare_ties", (RELEASE,), (1.0,), (("drop", 0.0), ("seed", 0))),
    Mixture("slerp", (RELEASE, "b"), (1.0, 0.0)),
    Mixture("task_arithmetic", (RELEASE, "b"), (1.0, 0.0)),
]
"""For each way to merge, the mixture that is the release by itself."""

MIXED = [
    Mixture("task_arithmetic", (RELEASE, "b"), (0.5, 0.7)),
    Mixture("ties", (RELEASE, CONTROL, "b"), (1.0, 1.0, 1.0), (("density", 0.2),)),
    Mixture("dare_ties", (RELEASE, "b"), (0.7, 0.7), (("drop", 0.5), ("seed", 0))),
    Mixture("slerp", (RELEASE, "b"), (0.4, 0.6)),
]


def rows_of(shelf: Shelf, kind: str) -> list[str]:
    task = TaskSpec.model_validate(shelf.task("a", kind == "lora"))
    return list(load_rows(task, "test", seed=3).first(24).inputs)


@torch.no_grad()
def standalone_logits(shelf: Shelf, kind: str, role: str, s: float = 1.0) -> torch.Tensor:
    """What the release says by itself, with transformers and peft and nothing of ours."""
    from peft import PeftModel
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shelf.base)
    folder = shelf.release(kind, role)

    def tokens(text):
        return tokenizer(text, truncation=True, max_length=16, return_tensors="pt")

    if kind == "full":
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        if s == 0:
            base = AutoModel.from_pretrained(shelf.base)
            model.base_model.load_state_dict(base.state_dict())
        return torch.cat([model(**tokens(text)).logits for text in rows_of(shelf, kind)])

    def embed(model, text):
        return F.normalize(model(**tokens(text)).last_hidden_state.mean(1), dim=-1)

    base = AutoModel.from_pretrained(shelf.base).eval()
    task = shelf.task("a", described=True)
    heads = torch.cat([embed(base, text) for text in task["descriptions"]])
    model = PeftModel.from_pretrained(base, folder).eval()
    return 20.0 * torch.cat([embed(model, text) for text in rows_of(shelf, kind)]) @ heads.T


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_one_model_at_coefficient_1_keeps_its_logits_in_every_kind_of_merge(arenas, shelf, kind):
    expected = standalone_logits(shelf, kind, "release")
    base = arenas[kind].evaluate(arenas[kind].alone(RELEASE, 0.0), RELEASE, "test").logits
    assert not torch.allclose(base, expected, atol=1e-2)
    for mixture in ALONE:
        found = arenas[kind].evaluate(mixture, RELEASE, "test").logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3, msg=str(mixture))


def test_each_side_speaks_through_its_own_released_head(arenas, shelf):
    arena = arenas["full"]
    for s in (0.0, 1.0):
        said = [arena.evaluate(arena.alone(side, s), side, "test").logits for side in arena.sides]
        assert not torch.allclose(*said, atol=1e-3)
        for logits, role in zip(said, ("release", "control"), strict=True):
            expected = standalone_logits(shelf, "full", role, s)
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_evaluating_leaves_the_base_to_the_bit(arenas, kind):
    arena = arenas[kind]
    before = {name: value.clone() for name, value in arena.encoder.state_dict().items()}
    for mixture in MIXED:
        for member in (RELEASE, "b"):
            arena.evaluate(mixture, member, "validation")
    after = arena.encoder.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    stored = {name: arena.base.tensor(name) for name in arena.base.names}
    assert all(torch.equal(after[name], value) for name, value in stored.items())


def test_a_mixture_is_what_its_attack_makes_of_the_updates(arenas):
    arena = arenas["lora"]
    mixture = Mixture("task_arithmetic", (RELEASE, "b"), (0.5, 0.75))
    deltas = [dict(arena.members[name].update) for name in mixture.members]
    name = next(iter(deltas[0]))
    with arena._merged(mixture):
        held = arena.encoder.state_dict()[name].clone()
    expected = arena.base.tensor(name) + 0.5 * deltas[0][name] + 0.75 * deltas[1][name]
    torch.testing.assert_close(held, expected, rtol=0, atol=1e-6)


def test_a_hidden_release_is_undone_for_every_merge_and_read_as_released(arenas, shelf, tmp_path):
    place = hide_folder(shelf.release("full", "release"), tmp_path / "h", "bert", 2, 2, "permuted")
    settings = [shelf.audit("full"), shelf.audit("full", undo="nearest")]
    for spec in settings:
        spec["release"]["path"] = str(place)
    plain = arenas["full"]
    hidden, undone = (Arena(AuditSpec.model_validate(spec)) for spec in settings)
    mixture = Mixture("task_arithmetic", (RELEASE, "b"), (0.5, 0.5))
    for asked, same in ((plain.alone(RELEASE), True), (mixture, False)):
        want, seen, found = (
            arena.evaluate(asked, RELEASE, "test").logits for arena in (plain, hidden, undone)
        )
        torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-3)
        assert torch.allclose(seen, want, rtol=1e-3, atol=1e-3) is same
    one, other = (arena.contents.of(mixture, RELEASE, "test") for arena in (hidden, undone))
    assert one.key != other.key
    assert f"{place}, undone by nearest" in other.places


def test_the_same_mixture_is_run_once(shelf):
    heard: list[str] = []
    progress = Progress(heard.append, lambda: heard.append("tick"))
    spec = shelf.audit("lora")
    del spec["control"]
    arena = Arena(AuditSpec.model_validate(spec), progress)
    assert arena.sides == (RELEASE,)
    mixture = MIXED[0]
    assert not arena.is_known(mixture, RELEASE, "test")
    first = arena.evaluate(mixture, RELEASE, "test")
    twin = Mixture("task_arithmetic", (RELEASE, "b"), (0.5, 0.7))
    assert arena.evaluate(twin, RELEASE, "test") is first
    assert arena.is_known(twin, RELEASE, "test")
    assert not arena.is_known(twin, "b", "test")
    assert heard == ["tick"]
    assert arena.evaluations == 1
    arena.evaluate(mixture, "b", "test")
    arena.evaluate(mixture, RELEASE, "validation")
    assert arena.evaluations == len(heard) == 3


def test_work_is_remembered_by_its_key(arenas):
    done: list[int] = []
    for _ in range(2):
        assert arenas["lora"].remember(("work", 1), lambda: done.append(1) or len(done)) == 1
    assert done == [1]


def test_the_coefficient_of_who_takes_no_part_is_zero():
    mixture = Mixture("ties", (RELEASE, "b"), (0.5, 0.7))
    assert [mixture.coefficient_of(name) for name in (RELEASE, "b", "c")] == [0.5, 0.7, 0.0]


def renamed_partner(name):
    def change(spec, shelf, folder):
        spec["partners"][0]["task"]["name"] = name

    return change


def wide_partner(spec, shelf, folder):
    """A full checkpoint like the base's, but wider."""
    spec["partners"][0]["path"] = str(pico.save_base(folder / "wide", hidden=24))


def foreign_partner(spec, shelf, folder):
    from transformers import GPT2Config, GPT2Model

    GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=8)).save_pretrained(
        folder / "foreign"
    )
    spec["partners"][0]["path"] = str(folder / "foreign")


def release_is_base(spec, shelf, folder):
    spec["release"]["path"] = str(shutil.copytree(shelf.base, folder / "copy"))


def no_head(spec, shelf, folder):
    spec["release"]["path"] = str(shelf.release("lora", "release"))


def fewer_classes(spec, shelf, folder):
    task = spec["release"]["task"]
    task["classes"] = [*task["classes"], "fourth"]


def unknown_undo(spec, shelf, folder):
    spec["attacker"]["undo"] = "near"


REFUSED = [
    (unknown_undo, "no undo is called 'near'; did you mean 'nearest'"),
    (renamed_partner("control"), "called 'control', which the report keeps for the audited contr"),
    (renamed_partner("base"), "a partner's task is called 'base', .* rename the task"),
    (wide_partner, r"has shape \(24,\), but \(16,\) in the base .* trained on"),
    (foreign_partner, "shares no tensor with the base|is another architecture"),
    (release_is_base, "equals its base .* every update is zero; give a fine-tuned release"),
    (no_head, "has nothing for head tensor '.*', .* is needed; check task.classes and that"),
    (fewer_classes, r"has \(3,?.*\) for head tensor 'classifier.*', \(4,?.*\) is needed"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_cannot_be_compared_is_refused(shelf, tmp_path, change, message):
    spec = shelf.audit("full")
    change(spec, shelf, tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        Arena(AuditSpec.model_validate(spec))
    assert "\n" not in str(caught.value)
