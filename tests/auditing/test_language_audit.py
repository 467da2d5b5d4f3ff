"""Language models from recipe to report: pico Llamas, LoRA and full, scored in several ways."""

import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

import pico
from auditing.test_ledger import same
from trap2.attacks.write import write_merge
from trap2.auditing import workers
from trap2.auditing.arena import RELEASE, Arena
from trap2.auditing.audit import audit
from trap2.auditing.ledger import Ledger
from trap2.auditing.mixture import Mixture
from trap2.auditing.sweep import sweep
from trap2.auditing.workers import Workers
from trap2.errors import UserError
from trap2.protecting.run import protect
from trap2.recipes import AuditSpec, Recipe
from trap2.reporting import html, text
from trap2.schema import Report
from trap2.taskspec import TaskSpec
from trap2.update import Update

KINDS = ("lora", "full")
ATTACKER: dict[str, Any] = {
    "attacks": ["task_arithmetic"],
    "coefficients": [0.0, 0.5, 1.0],
    "t3_values": [0.4, 1.0],
    "refine": 0,
    "validation_rows": 24,
    "test_rows": 24,
}


def write_rows(folder: Path, step: int) -> dict[str, str]:
    """Words that count on by `step`, as plain text, as prompts, and as a choice of three."""
    folder.mkdir(parents=True, exist_ok=True)
    draw, files = random.Random(step), {}
    for split, count in (("train", 96), ("validation", 24), ("test", 24)):
        rows = []
        for _ in range(count):
            start = draw.randrange(22)
            words = [f"w{2 + (start + step * i) % 22}" for i in range(draw.randint(5, 8))]
            others = draw.sample([f"w{i}" for i in range(2, 24) if f"w{i}" != words[-1]], 2)
            rows.append(
                {
                    "text": " ".join(words),
                    "prompt": " ".join(words[:-1]),
                    "completion": words[-1],
                    "options": [words[-1], *others],
                    "label": 0,
                }
            )
        path = folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files[split] = str(path)
    return files


def task(files: dict[str, str], name: str, kind: str = "language", **changes: Any) -> dict:
    known = {"name": name, "kind": kind, "data": dict(files), "max_length": 16}
    plain = {"input": "prompt"} if kind == "language" else {}
    return {**known, **plain, **changes}


class Bench:
    """A protected release, its control and a partner, of each kind."""

    def __init__(self, root: Path, base: Path) -> None:
        self.root, self.base = root, base
        self.files = {name: write_rows(root / name, step) for step, name in ((1, "a"), (3, "b"))}
        for method in KINDS:
            for role, name, strength in (
                ("release", "a", 0.5),
                ("control", "a", 0.0),
                ("partner", "b", 0.0),
            ):
                recipe = pico.recipe(base, task(self.files[name], name), method, steps=12)
                recipe["trap2"]["strength"] = strength
                recipe["training"] |= {"learning_rate": 0.02, "evaluate_every": 12}
                protect(Recipe.model_validate(recipe), self.path(method, role), quiet=True)

    def path(self, method: str, role: str) -> Path:
        return self.root / method / role

    def audit(self, method: str, kind: str = "language", **attacker: Any) -> AuditSpec:
        short = {"max_new_tokens": 1} if kind == "generation" else {}
        own, other = (task(self.files[name], name, kind, **short) for name in "ab")
        return AuditSpec.model_validate(
            {
                "base": str(self.base),
                "release": {"path": str(self.path(method, "release")), "task": own},
                "control": str(self.path(method, "control")),
                "partners": [{"path": str(self.path(method, "partner")), "task": other}],
                "attacker": {**ATTACKER, **attacker},
                "scales": [0.0, 1.0],
            }
        )


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, pico_llama: Path) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"), pico_llama)


@pytest.fixture(scope="module")
def report(bench: Bench) -> Report:
    return audit(bench.audit("lora"))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[2, 3, 4, 5]])).logits


@pytest.mark.parametrize("method", KINDS)
def test_a_release_loads_with_the_usual_libraries(bench: Bench, method: str) -> None:
    folder = bench.path(method, "release")
    loader: Any = AutoPeftModelForCausalLM if method == "lora" else AutoModelForCausalLM
    found = logits(loader.from_pretrained(folder))
    base = logits(AutoModelForCausalLM.from_pretrained(bench.base))
    assert (found - base).abs().max() > 0.1
    card = (folder / "README.md").read_text()
    assert "(kind language)" in card
    assert "| s | accuracy | loss |" in card
    assert "re-labelled is" not in card
    record = json.loads((folder / "trap2.json").read_text())
    assert all(point["relabelled"] is None for point in record["validation"]["scale_curve"])
    assert record["digests"]["files"]


def test_the_task_was_learned_and_the_trap_was_there(bench: Bench) -> None:
    for method in KINDS:
        curve, control = (
            json.loads((bench.path(method, role) / "trap2.json").read_text())["validation"]
            for role in ("release", "control")
        )
        plain = {p["s"]: p for p in control["scale_curve"]}
        assert plain[1.0]["loss"] < plain[0.0]["loss"]
        assert {p["s"]: p for p in curve["scale_curve"]}[0.0] == pytest.approx(plain[0.0])


def test_the_output_layer_stays_the_bases(bench: Bench) -> None:
    adapted = Update.open(bench.path("lora", "release"), bench.base)
    assert "lm_head.weight" not in adapted.shared
    assert adapted.head == {}
    whole = Update.open(bench.path("full", "release"), bench.base)
    assert "lm_head.weight" in whole.shared
    assert whole.head == {}


def test_an_audit_without_classes_leaves_out_relabelling_and_says_so(report: Report) -> None:
    assert list(report.tiers) == ["T1", "T3"]
    assert report.settings["relabel_rows"] == []
    assert report.references.relabelled == []
    assert report.release.classes == 0
    assert report.limits[0].startswith("Re-labelling (T2) reads class outputs, and a task of kind ")
    assert "re-labelled" not in report.verdict
    assert report.references.chance > 0
    assert report.scale_curve[1].loss < report.scale_curve[0].loss
    assert report.evidence.reload_gap == {
        "release": pytest.approx(0, abs=1e-4),
        "control": pytest.approx(0, abs=1e-4),
    }
    for attack in report.attacks:
        assert attack.interval is not None
        low, high = attack.interval
        assert low <= attack.retained <= high
    assert all(tier.interval is not None for tier in report.tiers.values())
    assert not {"T007", "T012"} & {flag.code for flag in report.flags}


def test_its_report_can_be_drawn(report: Report, tmp_path: Path) -> None:
    html.save(report, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "kind language has none" in page
    assert "kind language has none" in text.render(report)


def test_scores_stand_on_whole_rows_of_the_release_alone(bench: Bench, report: Report) -> None:
    spec = bench.audit("lora")
    points = sweep(
        spec.release.path, spec.base, spec.release.task, [0.0, 1.0], rows=24, seed=spec.seed
    )
    assert points == report.scale_curve
    assert report.references.base == points[0].accuracy
    assert report.references.standalone == points[1].accuracy


@pytest.mark.parametrize("kind", ["language", "generation", "choice"])
def test_a_ledger_gives_the_same_audit_back(bench: Bench, tmp_path: Path, kind: str) -> None:
    spec = bench.audit("full", kind, **({"relabel_rows": [8]} if kind == "choice" else {}))
    with Ledger(tmp_path) as ledger:
        first, second = audit(spec, ledger=ledger), audit(spec, ledger=ledger)
    alike = {"created": "", "seconds": 0.0}
    assert first.model_copy(update=alike) == second.model_copy(update=alike)
    assert ("T2" in first.tiers) is (kind == "choice")
    assert first.release.classes == (3 if kind == "choice" else 0)


CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("language", {"score": "likelihood"}),
    ("language", {"max_length": 5}),
    ("generation", {"max_new_tokens": 2}),
    ("generation", {"stop": "w3"}),
    ("choice", {"length_normalised": False}),
    ("choice", {"classes": ["w2", "w3"]}),
]


@pytest.mark.parametrize(("kind", "change"), CHANGES)
def test_what_decides_a_score_is_in_the_key(
    bench: Bench, kind: str, change: dict[str, Any]
) -> None:
    assert key(bench, kind) == key(bench, kind)
    assert key(bench, kind) != key(bench, kind, **change)


def key(bench: Bench, base: str, **changes: Any) -> str:
    spec = bench.audit("lora", base).model_dump(mode="json")
    spec["release"]["task"].update(changes)
    arena = Arena(AuditSpec.model_validate(spec))
    return arena.contents.of(arena.alone(RELEASE), RELEASE, "test").key


SCORER = """
def score(model, processor, inputs, labels):
    return [float(len(text) % 2 == 0) for text in inputs]


def closed(number):
    return lambda *given: [number]
"""


@pytest.fixture
def scorer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module on the user's own path."""
    path = tmp_path / "scorer_of_mine.py"
    path.write_text(SCORER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "scorer_of_mine", raising=False)
    yield path
    sys.modules.pop("scorer_of_mine", None)


def of_function(bench: Bench, named: Any = "scorer_of_mine:score") -> TaskSpec:
    own = task(bench.files["a"], "a", "function", input="prompt", label="completion")
    return TaskSpec.model_validate({**own, "function": named})


def test_a_function_of_ones_own_scores(bench: Bench, scorer: Path) -> None:
    spec = bench.audit("lora").model_copy(deep=True)
    own = of_function(bench)
    points = sweep(spec.release.path, spec.base, own, [1.0], rows=24)
    rows = [json.loads(line) for line in Path(bench.files["a"]["test"]).read_text().splitlines()]
    even = sum(len(row["prompt"]) % 2 == 0 for row in rows) / len(rows)
    assert points[0].accuracy == pytest.approx(even)
    assert points[0].loss == pytest.approx(1 - even)
    assert own.model_dump(mode="json")["function"] == "scorer_of_mine.score"
    assert TaskSpec.model_validate_json(own.model_dump_json()) == own


def test_another_source_of_the_function_is_another_key(bench: Bench, scorer: Path) -> None:
    def now() -> str:
        sys.modules.pop("scorer_of_mine", None)
        changes = {"kind": "function", "function": "scorer_of_mine:score"}
        return key(bench, "language", **changes, label="completion")

    before = now()
    assert now() == before
    scorer.write_text(SCORER.replace("== 0", "== 1"))
    assert now() != before


def test_a_function_is_one_that_a_record_can_name(bench: Bench, scorer: Path) -> None:
    import scorer_of_mine

    with pytest.raises(ValueError, match="no function at the top of a module, so no record"):
        of_function(bench, scorer_of_mine.closed(1.0))
    with pytest.raises(ValueError, match="No module named 'nowhere'"):
        of_function(bench, "nowhere:score")


BY_MODEL = """
import os, pathlib
import torch

def score(model, processor, inputs, labels):
    with pathlib.Path(__file__).with_name("processes").open("a") as stream:
        stream.write(f"{os.getpid()}\\n")
    read = (processor([text], return_tensors="pt")["input_ids"] for text in inputs)
    with torch.no_grad():
        return [float(model(input_ids=ids).logits[0, -1].softmax(0)[2]) for ids in read]
"""


def by_function(bench: Bench) -> AuditSpec:
    """The audit in which a function of one's own judges the release."""
    spec = bench.audit("lora").model_dump(mode="json")
    spec["release"]["task"] |= {"kind": "function", "function": "scorer_of_mine:score"}
    spec["release"]["task"]["label"] = "completion"
    return AuditSpec.model_validate(spec)


def test_workers_score_by_a_function_of_ones_own(
    bench: Bench, scorer: Path, tmp_path: Path
) -> None:
    scorer.write_text(BY_MODEL)
    spec, processes = by_function(bench), scorer.with_name("processes")
    with Ledger(tmp_path) as ledger, Workers(spec, 2, threads=torch.get_num_threads()) as crew:
        report = audit(spec, ledger=ledger, crew=crew)
    assert {*processes.read_text().split()} - {str(os.getpid())}
    assert same(report, audit(spec))
    assert len({point.accuracy for point in report.scale_curve}) == len(report.scale_curve)


def test_a_function_that_workers_cannot_find_is_refused(
    bench: Bench, scorer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = by_function(bench)
    text = spec.model_dump_json()
    monkeypatch.delitem(sys.modules, "scorer_of_mine")
    scorer.unlink()
    job = (Mixture("task_arithmetic", (RELEASE,), (1.0,)), ((RELEASE, "test"),))
    with pytest.raises(UserError, match=r"a worker cannot open this audit: .* No module named 's"):
        workers._work(
            text, os.getpid(), torch.get_num_threads(), "trap2.attacks.task_arithmetic", job
        )
    with pytest.raises(UserError, match=r"named 'nowhere'; what an attack or a task's function n"):
        workers._work(text, os.getpid(), torch.get_num_threads(), "nowhere", job)

    def here(model: Any, processor: Any, inputs: Any, labels: Any) -> list[float]:
        return [1.0 for _ in inputs]

    here.__module__, here.__qualname__ = "__main__", "here"
    monkeypatch.setattr(sys.modules["__main__"], "here", here, raising=False)
    given = spec.model_dump(mode="json")
    given["partners"][0]["task"] |= {"kind": "function", "function": "__main__:here"}
    given["release"]["task"] = bench.audit("lora").release.task.model_dump(mode="json")
    with pytest.raises(UserError) as caught:
        Workers(AuditSpec.model_validate(given), 2)
    assert str(caught.value) == (
        "the function of task 'b' is defined in the script that is run, where workers do not find "
        "it; define it in a module of its own, or do without workers"
    )


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        ("None", "returned a NoneType; it must return one number in [0, 1] for each row"),
        ("[2.0] * len(inputs)", "for 24 rows; it must return one in [0, 1] for each"),
        ("[0.5]", "returned (1,) numbers from 0.5 to 0.5 for 24 rows; it must return one in"),
    ],
)
def test_a_function_that_gives_no_scores_is_refused(
    bench: Bench, scorer: Path, returned: str, reason: str
) -> None:
    scorer.write_text(f"def score(model, processor, inputs, labels):\n    return {returned}\n")
    spec = bench.audit("lora")
    with pytest.raises(UserError) as caught:
        sweep(spec.release.path, spec.base, of_function(bench), [1.0], rows=24)
    assert reason in str(caught.value)


def test_who_judges_only_trains_nothing(bench: Bench, scorer: Path, tmp_path: Path) -> None:
    recipe = Recipe(base=str(bench.base), task=of_function(bench))
    with pytest.raises(UserError) as caught:
        protect(recipe, tmp_path / "out", quiet=True)
    assert str(caught.value) == (
        "task 'a' is of kind function, which judges and gives nothing to learn; train with one of "
        "text, image, language, generation, choice and audit with this one"
    )


@pytest.mark.parametrize(
    "attacker", [{"data_attacks": ["regmean"]}, {"recovery": ["finetune_after"]}]
)
def test_attackers_who_run_rows_know_heads_of_classes_only(
    bench: Bench, attacker: dict[str, Any]
) -> None:
    with pytest.raises(UserError) as caught:
        audit(bench.audit("lora", **attacker))
    assert str(caught.value) == (
        "task 'a' is of kind language, and tiers T4 and T5 work on the outputs of a head of "
        "classes; remove attacker.data_attacks and attacker.recovery"
    )


def test_a_merge_is_written_as_a_language_model(bench: Bench, tmp_path: Path) -> None:
    updates = [Update.open(bench.path("lora", r), bench.base) for r in ("release", "partner")]
    out = write_merge(tmp_path / "merged", "task_arithmetic", updates, [1.0, 0.0], {})
    alone = AutoPeftModelForCausalLM.from_pretrained(bench.path("lora", "release"))
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert torch.allclose(logits(merged), logits(alone), atol=1e-4)


def test_a_partner_may_have_classes(bench: Bench, tmp_path: Path, pico_llama: Path) -> None:
    files = {}
    for split, count in (("train", 24), ("validation", 24), ("test", 24)):
        path = tmp_path / f"{split}.csv"
        lines = [f"w{2 + i % 20} w{3 + i % 9},{i % 2}" for i in range(count)]
        path.write_text("\n".join(["text,label", *lines]) + "\n")
        files[split] = str(path)
    own = {"name": "c", "data": files, "classes": ["even", "odd"], "max_length": 8}
    recipe = pico.recipe(pico_llama, own, "lora", steps=3, strength=0)
    partner = protect(Recipe.model_validate(recipe), tmp_path / "partner", quiet=True)
    spec = bench.audit("lora").model_dump(mode="json")
    spec["partners"] = [{"path": str(partner), "task": own}]
    found = audit(AuditSpec.model_validate(spec))
    alone = sweep(partner, str(pico_llama), TaskSpec.model_validate(own), [1.0], rows=24)
    assert found.references.partners == {"c": pytest.approx(alone[0].accuracy)}
    assert found.references.partners_chance == {"c": 0.5}
