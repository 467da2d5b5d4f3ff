"""The README is a promise: its code runs, its recipes validate, its commands parse."""

import re
import shlex
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForSequenceClassification, TrainingArguments

import pico
from trap2.cli import parser
from trap2.recipes import AuditSpec, Recipe, load

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def classifier(pico_base: Path) -> torch.nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(pico_base, num_labels=3)


def batches(count: int = 2) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "input_ids": torch.randint(2, 30, (4, 6), generator=generator),
            "attention_mask": torch.ones(4, 6, dtype=torch.long),
            "labels": torch.tensor([0, 1, 2, 0]),
        }
        for _ in range(count)
    ]


def test_the_loop_with_the_added_lines_trains(pico_base: Path) -> None:
    (diff,) = blocks("diff")
    lines = [line for line in diff.splitlines() if not line.startswith("-")]
    code = "\n".join(line[2:] for line in lines)
    model = classifier(pico_base)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names = {
        "model": model,
        "loader": batches(),
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer),
        "torch": torch,
    }
    exec(code, names)  # the README's own code, that is the test
    assert names["loss"].isfinite()
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert any(moved)


def test_the_trainer_form_trains(pico_base: Path, tmp_path: Path) -> None:
    (code,) = blocks("python")
    rows = [{key: value[i] for key, value in b.items()} for b in batches() for i in range(4)]
    names = {
        "model": classifier(pico_base),
        "args": TrainingArguments(
            str(tmp_path), max_steps=2, report_to=[], disable_tqdm=True, use_cpu=True
        ),
        "data": rows,
    }
    exec(code, names)  # the README's own code, that is the test
    assert names["trainer"].state.global_step == 2
    assert names["trainer"].trap2.strength > 0


def test_the_recipe_and_the_audit_validate(tmp_path: Path) -> None:
    recipe, audit = blocks("yaml")
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    task = yaml.safe_load(recipe)["task"]
    assert load(Recipe, path).method == "lora"
    content = yaml.safe_load(audit.replace("{...}", "null"))
    for place, entry in enumerate([content["release"], *content["partners"]]):
        entry["task"] = {**task, "name": f"task {place}"}
    pico.write_yaml(path, content)
    assert len(load(AuditSpec, path).partners) == 2


def test_every_command_parses() -> None:
    whole = [block.replace("\\\n", "") for block in blocks("bash")]
    lines = [line for block in whole for line in block.splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("trap2 ")]
    assert {words[1] for words in commands} >= {"protect", "sweep", "attack", "audit", "list"}
    for words in commands:
        assert parser().parse_args(words[1:]).command == words[1]


def test_every_linked_file_exists() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_its_table_is_that_of_the_results() -> None:
    lines = (ROOT / "results" / "protection.md").read_text().splitlines()
    table = "\n".join(line for line in lines if line.startswith("|"))
    assert table.count("\n") > 5
    assert table in README
