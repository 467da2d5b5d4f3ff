"""The command line: its whole surface, and that bad input ends in one line and leaves nothing."""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import pico
from auditing.shelf import Shelf, stock
from reporting.samples import build_report
from trap2 import __version__
from trap2.auditing.recovery import METHODS
from trap2.cli import main, parser
from trap2.files import LEDGER, LOCK, held, weights_digest
from trap2.schema import Report

SURFACE = {
    "protect": ["recipe", "--out", "--set", "--overwrite", "--resume"],
    "surrogates": ["recipe", "--out", "--set", "--overwrite"],
    "sweep": ["release", "--recipe", "--scales", "--split", "--rows"],
    "attack": [
        *("name", "--release", "--partners", "--base", "--coefficient", "--coefficients"),
        *("--param", "--undo", "--out", "--as", "--overwrite"),
    ],
    "audit": [
        *("audit", "--out", "--suite", "--set", "--overwrite", "--ledger"),
        *("--workers", "--backend", "--ray-address", "--require"),
    ],
    "combine": ["reports", "--out", "--overwrite"],
    "report": ["report", "--out", "--figure"],
    "compare": ["reports", "--out"],
    "card": ["release", "report"],
    "sign": ["release", "--key"],
    "verify": ["release", "--key", "--report"],
    "list": ["what", "--suite"],
    "demo": ["--out", "--overwrite", "--short"],
}
"""Every sub-command and flag. Growing it is a deliberate act: each one is a promise."""


def commands() -> dict[str, argparse.ArgumentParser]:
    (found,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    return found.choices


def test_the_surface_is_frozen():
    found = {
        name: [
            a.option_strings[-1] if a.option_strings else a.dest
            for a in command._actions
            if not isinstance(a, argparse._HelpAction)
        ]
        for name, command in commands().items()
    }
    assert found == SURFACE
    top = [a.option_strings for a in parser()._actions if a.option_strings]
    assert top == [["-h", "--help"], ["--version"]]


def test_every_argument_says_what_it_is():
    for name, command in commands().items():
        for action in command._actions:
            assert action.help, f"{name} {action.dest}"


@pytest.mark.parametrize("arguments", [[], *([name] for name in SURFACE)])
def test_every_command_has_help(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for name in SURFACE[arguments[0]] if arguments else SURFACE:
        assert name.replace("what", "{attacks,losses,undos}") in shown


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"trap2 {__version__}\n"


HEAVY = {"torch", "transformers", "peft", "datasets", "numpy", "pydantic", "yaml", "tqdm"}


def loaded_by(arguments: list[str]) -> set[str]:
    """Which heavy modules a fresh interpreter holds after a command."""
    code = (
        "import sys\nfrom trap2.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
        "print('\\n' + ' '.join({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return HEAVY & set(done.stdout.splitlines()[-1].split())


def test_help_imports_nothing_heavy_and_a_command_that_does_is_seen():
    assert loaded_by(["--help"]) == set()
    assert "torch" in loaded_by(["list", "losses"])


def test_python_dash_m_is_the_same_program():
    done = subprocess.run(
        [sys.executable, "-m", "trap2", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"trap2 {__version__}\n"


def test_attacks_are_listed_with_tiers_papers_and_grids(capsys):
    assert main(["list", "attacks"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = {line.split()[0]: line for line in lines}
    others = {name for name in listed if name.startswith(("mergekit_", "peft_"))}
    assert len(others) == 30
    assert [name for name in listed if name not in others] == [
        "name",
        *("adamerging", "breadcrumbs", "cart", "chain_of_merges", "consensus", "dare_linear"),
        *("dare_ties", "della", "depth_sixths", "depth_thirds", "distac", "emr"),
        *("equal_norms", "fisher", "iso_c", "iso_cts", "karcher"),
        *("layer_groups", "lines", "model_stock", "noisy", "nuslerp", "pcb", "prodistill"),
        *("pruned", "regmean", "regmean_pp", "rounded", "slerp", "tall_masks", "task_arithmetic"),
        *("thinned", "ties", "ties_core", "ties_knots", "ties_sum", "truncated", "tsv", "wudi"),
    ]
    assert listed["ties"].split()[1:6] == ["T1", "T2", "T3", "-", "44"]
    assert "44  https://arxiv.org/abs/2306.01708  density in (0.1, 0.2" in listed["ties"]
    assert listed["slerp"].split()[1:5] == ["T1", "T2", "base", "11"]
    assert listed["regmean"].split()[1:3] == ["T4", "data"]
    assert listed["regmean"].endswith("https://arxiv.org/abs/2212.09849  alpha in (0.9, 1.0)")


def test_a_suite_is_listed_with_what_it_tries_and_costs(capsys):
    assert main(["list", "attacks", "--suite", "standard-v1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = {line.split()[0]: line for line in lines}
    assert listed["task_arithmetic"].split()[1:6] == ["T1", "T2", "T3", "-", "14"]
    assert listed["iso_c"].split()[1:5] == ["T1", "T2", "-", "8"]
    assert listed["ties_core"].endswith("density in (0.2, 1.0)")
    assert main(["list", "attacks", "--suite", "recovery-v1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [[m, "T5", "labels"] for m in METHODS]
    assert lines[1].endswith("4  rows in (30, 100), steps in (30, 100, 300)")
    for wrong, message in (
        (["attacks", "--suite", "standard"], "no suite is called 'standard'; did you mean 'stand"),
        (["losses", "--suite", "quick"], "--suite is about attacks; write: trap2 list attacks --"),
    ):
        assert main(["list", *wrong]) == 2
        assert message in in_one_line(capsys.readouterr().err)


def test_an_audit_with_a_suite_keeps_to_it(capsys, shelf, tmp_path):
    content = shelf.audit("lora")
    rows = {"relabel_rows": [6], "validation_rows": 24, "test_rows": 24}
    path = written(tmp_path, {**content, "attacker": rows})
    assert main(["audit", path, "--out", str(tmp_path / "out"), "--suite", "quick"]) == 0
    report = Report.load(tmp_path / "out" / "report.json")
    assert report.settings["suite"] == "quick"
    assert report.rows["evaluations"] <= 400
    assert list(report.tiers) == ["T1", "T2", "T3"]
    path = written(tmp_path, content, "other.yaml")
    assert main(["audit", path, "--out", str(tmp_path / "no"), "--suite", "quick"]) == 2
    message = "attacker.attacks is fixed by the suite 'quick'; remove it, or the suite"
    assert message in in_one_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--backend", "ray"], "--backend ray with one worker gains nothing; add --workers N"),
        (["--workers", "2", "--ray-address", "a:1"], "--ray-address a:1 needs --backend ray; add"),
    ],
)
def test_workers_that_contradict_themselves_are_refused(capsys, shelf, tmp_path, given, message):
    path = written(tmp_path, shelf.audit("lora"))
    assert main(["audit", path, "--out", str(tmp_path / "out"), *given]) == 2
    assert message in in_one_line(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["losses", "undos"])
def test_losses_and_ways_to_undo_are_listed_with_what_they_do(capsys, what):
    assert main(["list", what]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 2
    assert all(len(line.split()) > 2 for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["merge"], "invalid choice: 'merge'"),
        (["attack", "ties", "--release", "r", "--out", "o"], "one of the arguments --coefficient "),
        (["attack", "ties", "--param", "k"], "'k' is not of the form k=v; write for example dens"),
        (["audit", "a.yaml"], "the following arguments are required: --out"),
        (["sweep", "r", "--recipe", "r.yaml", "--scales", "0,x"], "'0,x' is no list of numbers; w"),
        (["audit", "a.yaml", "--out", "o", "--workers", "0"], "'0' is no count; write a whole num"),
        (["audit", "a.yaml", "--out", "o", "--backend", "mpi"], "invalid choice: 'mpi'"),
        (["list", "papers"], "invalid choice: 'papers'"),
        *(
            (
                ["audit", "a.yaml", "--out", "o", "--require", wrong],
                f"'{wrong}' names no tiers with",
            )
            for wrong in ("T1", "T6=0.5", "T1=1.5", "T1=0.9,,T2=0.5", "T1=-0.1", "T1=nan")
        ),
    ],
)
def test_wrong_arguments_end_with_usage_and_2(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.startswith("usage: trap2")


@pytest.fixture(scope="session")
def shelf(pico_base: Path) -> Shelf:
    return stock(pico_base)


def written(folder: Path, content: dict[str, Any], name: str = "audit.yaml") -> str:
    return str(pico.write_yaml(folder / name, content))


def test_an_audit_writes_a_report_and_prints_it(capsys, shelf, tmp_path):
    spec = written(tmp_path, shelf.audit("lora", attacks=["task_arithmetic"]))
    out = tmp_path / "deep" / "audit"
    change = ["--set", "attacker.t3_attacks=[]", "--set", "attacker.relabel_rows=[6]"]
    assert main(["audit", spec, "--out", str(out), *change]) == 0
    report = Report.load(out / "report.json")
    assert list(report.tiers) == ["T1", "T2"]
    assert sorted(p.name for p in out.iterdir()) == [LEDGER, "report.html", "report.json"]
    assert sorted(p.name for p in out.parent.iterdir()) == ["audit"]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>".upper()) or "<html" in page
    shown = capsys.readouterr().out
    assert f"{100 * report.references.standalone:.1f}" in shown
    assert shown.endswith(f"report: {out / 'report.html'}\n")


def test_a_merge_is_written_and_says_whose_head_it_has(capsys, shelf, tmp_path):
    release, partner = (str(shelf.release("full", role)) for role in ("release", "partner"))
    out = tmp_path / "merged"
    arguments = ["attack", "ties", "--release", release, "--partners", partner, "--out", str(out)]
    arguments += ["--coefficients", "1,0.5", "--param", "density=0.5"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert shown == f"merged: {out} (the release's own head, heads are never merged)\n"
    assert json.loads((out / "merge.json").read_text())["coefficients"] == [1.0, 0.5]
    assert main(arguments) == 2
    assert "exists already; pass --overwrite or choose" in in_one_line(capsys.readouterr().err)
    other = [*arguments[:-1], "dense=1", "--overwrite"]
    assert main(other) == 2
    assert "no parameter 'dense'; did you mean 'density'" in in_one_line(capsys.readouterr().err)


def test_a_merge_as_an_adapter_of_releases_without_a_head(capsys, shelf, tmp_path):
    release = str(shelf.release("lora", "release"))
    arguments = ["attack", "task_arithmetic", "--release", release, "--as", "adapter"]
    out = tmp_path / "out"
    assert main([*arguments, "--coefficient", "0.5", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"merged: {out} (no head)\n"
    assert sorted(p.name for p in out.iterdir()) == [
        *("adapter_config.json", "adapter_model.safetensors", "merge.json")
    ]
    undo = ["--undo", "nearest", "--coefficient", "0.5", "--out", str(tmp_path / "undone")]
    assert main([*arguments, *undo]) == 2
    message = "undo 'nearest' changes whole weights, which no adapter of the updates' ranks holds"
    assert message in in_one_line(capsys.readouterr().err)


def test_an_audit_replaces_a_report_only_when_asked(capsys, shelf, tmp_path):
    spec = written(tmp_path, shelf.audit("lora", attacks=["task_arithmetic"], t3_attacks=[]))
    out = tmp_path / "audit"
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    assert main(["audit", spec, "--out", str(out)]) == 2
    assert "exists already; pass --overwrite or choose another" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["mine.txt"]
    ledger = tmp_path / "ledger"
    arguments = ["audit", spec, "--out", str(out), "--overwrite", "--ledger", str(ledger)]
    assert main(arguments) == 0
    assert sorted(p.name for p in out.iterdir()) == ["mine.txt", "report.html", "report.json"]
    assert (out / "mine.txt").read_text() == "kept"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["audit", "audit.yaml", "ledger"]
    assert [p.name for p in ledger.iterdir()] == [LEDGER]


def test_a_requirement_that_is_not_met_ends_in_1_with_the_report(capsys, shelf, tmp_path):
    spec = written(tmp_path, shelf.audit("lora", attacks=["task_arithmetic"], t3_attacks=[]))
    out, ledger = tmp_path / "audit", ["--ledger", str(tmp_path / "ledger")]
    needed = ["--require", "T1=0.5,T3=0.25,T5=0.1"]  # a pico has nothing to protect
    assert main(["audit", spec, "--out", str(out), *ledger, *needed]) == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-3:] == [
        "trap2: not met: T1 has nothing to protect, 0.5 is required",
        "trap2: not met: T3 was not tested, 0.25 is required",
        "trap2: not met: T5 was not tested, 0.1 is required",
    ]
    assert captured.out.endswith(f"report: {out / 'report.html'}\n")
    assert Report.load(out / "report.json").tiers["T1"].verdict == "nothing to protect"


def test_an_output_that_is_in_use_or_not_writable_is_refused(capsys, shelf, tmp_path):
    spec = written(tmp_path, shelf.audit("lora"))
    out = tmp_path / "audit"
    with held(out):
        assert main(["audit", spec, "--out", str(out)]) == 2
        assert [p.name for p in out.iterdir()] == [LOCK]
    assert f"{out} is in use by another process" in in_one_line(capsys.readouterr().err)
    assert main(["audit", spec, "--out", "/dev/null/audit"]) == 2
    message = "cannot write /dev/null/audit: Not a directory; free space or choose another place"
    assert message in in_one_line(capsys.readouterr().err)
    assert [p.name for p in tmp_path.iterdir()] == ["audit.yaml"]


def test_a_trap_that_did_not_close_is_warned_of(capsys, shelf, tmp_path):
    recipe = pico.recipe(shelf.base, shelf.task("a", described=True), steps=20)
    path = written(tmp_path, recipe, "recipe.yaml")
    arguments = ["protect", path, "--out", str(tmp_path / "release"), "--set"]
    assert main([*arguments, "trap2.warmup=100"]) == 0
    said = capsys.readouterr()
    assert "trap2: warning: the trap did not close: at scale 0.5 or 0.8 " in said.err
    assert said.out.startswith("release: ")
    assert main([*arguments, "trap2.strength=0", "--overwrite"]) == 0
    assert "warning" not in capsys.readouterr().err


def test_a_sweep_prints_a_line_for_each_scale(capsys, shelf, tmp_path):
    recipe = pico.recipe(shelf.base, shelf.task("a", described=True))
    path = written(tmp_path, recipe, "recipe.yaml")
    release = str(shelf.release("lora", "release"))
    arguments = ["sweep", release, "--recipe", path, "--scales", "0,1,1.5", "--rows", "12"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["s", "accuracy", "loss"]
    assert [line.split()[0] for line in lines[1:]] == ["0", "1", "1.5"]
    assert all(line.split()[1].endswith("%") for line in lines[1:])
    assert main([*arguments[:-1], "0"]) == 2
    said = capsys.readouterr()
    assert "rows=0 leaves nothing to evaluate on" in said.err
    assert said.out == ""


def test_a_release_is_made_from_a_recipe(capsys, shelf, tmp_path):
    recipe = pico.recipe(shelf.base, shelf.task("a", described=True), steps=2)
    path = written(tmp_path, recipe, "recipe.yaml")
    out = tmp_path / "release"
    assert main(["protect", path, "--out", str(out), "--set", "training.steps=1"]) == 0
    assert capsys.readouterr().out.endswith(f"release: {out}\n")
    assert json.loads((out / "trap2.json").read_text())["recipe"]["training"]["steps"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recipe.yaml", "release"]
    assert main(["protect", path, "--out", str(out)]) == 2
    assert "exists already; pass --overwrite" in capsys.readouterr().err


Change = Callable[[dict[str, Any], Shelf, Path], None]


def set_to(value: Any, *keys: Any) -> Change:
    def change(spec: dict[str, Any], shelf: Shelf, folder: Path) -> None:
        place: Any = spec
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return change


def copied_release(spec: dict[str, Any], folder: Path) -> Path:
    copy = shutil.copytree(spec["release"]["path"], folder / "copy")
    spec["release"]["path"] = str(copy)
    return copy


def pickled(spec: dict[str, Any], shelf: Shelf, folder: Path) -> None:
    copy = copied_release(spec, folder)
    (copy / "adapter_model.safetensors").rename(copy / "adapter_model.bin")


def with_nan(spec: dict[str, Any], shelf: Shelf, folder: Path) -> None:
    path = copied_release(spec, folder) / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[min(tensors)][0, 0] = torch.nan
    save_file(tensors, path)


def cut_short(spec: dict[str, Any], shelf: Shelf, folder: Path) -> None:
    path = copied_release(spec, folder) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def other_base(spec: dict[str, Any], shelf: Shelf, folder: Path) -> None:
    spec["base"] = str(pico.save_base(folder / "other", seed=1))


def release_is_base(spec: dict[str, Any], shelf: Shelf, folder: Path) -> None:
    spec["release"]["path"] = str(shutil.copytree(shelf.base, folder / "copy"))


def wide_partner(spec: dict[str, Any], shelf: Shelf, folder: Path) -> None:
    spec["partners"][0]["path"] = str(pico.save_base(folder / "wide", hidden=24))


def rows(*lines: str) -> Change:
    def change(spec: dict[str, Any], shelf: Shelf, folder: Path) -> None:
        path = folder / "test.csv"
        path.write_text("\n".join(["text,label", *lines]) + "\n")
        spec["release"]["task"]["data"]["test"] = str(path)

    return change


BAD: list[tuple[Change, str]] = [
    (set_to("nowhere", "release", "path"), "nowhere is not a folder; give a folder of released"),
    (set_to("no.csv", "release", "task", "data", "test"), "no.csv does not exist; check the path"),
    (
        set_to(1, "attacker", "t3_sweep"),
        "unknown key 'attacker.t3_sweep'; did you mean 't3_sweeps'?",
    ),
    (set_to("many", "attacker", "test_rows"), "attacker.test_rows='many' is not acceptable: "),
    (set_to(["tise"], "attacker", "attacks"), "no attack is called 'tise'; did you mean 'ties'?"),
    (
        set_to({"ties": {"desity": [1]}}, "attacker", "grids"),
        "desity is no parameter of 'ties'; it",
    ),
    (set_to([0, float("nan")], "scales"), "nan"),
    (pickled, "adapter_model.bin is a pickle, which can run code when opened, and is refused"),
    (with_nan, "holds NaN or infinity; the weights are broken"),
    (cut_short, "adapter_model.safetensors: "),
    (other_base, "give the base it was trained on"),
    (release_is_base, "every update is zero; give a fine-tuned release"),
    (wide_partner, "give the base it was trained on"),
    (rows("w1 w2,0", "w3,7"), "has label 7, outside the head's 3 classes"),
    (rows(), "test rows"),
]


def in_one_line(shown: str) -> str:
    """The error line, after checking that it is the only one and the last."""
    assert "Traceback" not in shown
    lines = [line for line in shown.replace("\r", "\n").splitlines() if line.strip()]
    assert lines[-1].startswith("trap2: error: ")
    assert [line for line in lines if "error" in line.lower()] == lines[-1:]
    return lines[-1]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input_ends_in_one_line_and_2_and_leaves_nothing(
    capfd, shelf, tmp_path, change, message
):
    spec = shelf.audit("lora")
    change(spec, shelf, tmp_path)
    path = written(tmp_path, spec)
    before = sorted(tmp_path.rglob("*"))
    assert main(["audit", path, "--out", str(tmp_path / "made" / "audit")]) == 2
    captured = capfd.readouterr()
    assert message in in_one_line(captured.err)
    assert captured.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_a_bank_is_made_from_a_recipe_and_then_used_by_another(capsys, shelf, tmp_path):
    task = shelf.task("a", described=True)
    training = {"steps": 2, "batch_size": 8, "evaluate_every": 2}
    bank = {"base": str(shelf.base), "tasks": [task], "training": training}
    path, out = written(tmp_path, bank, "bank.yaml"), tmp_path / "bank"
    assert main(["surrogates", path, "--out", str(out), "--set", "count=1"]) == 0
    assert capsys.readouterr().out.endswith(f"bank: {out}\n")
    assert main(["surrogates", path, "--out", str(out)]) == 2
    assert f"{out} exists already; pass --overwrite" in in_one_line(capsys.readouterr().err)
    recipe = pico.recipe(shelf.base, shelf.task("b", described=True), steps=2, surrogates="bank")
    path = written(tmp_path, recipe, "recipe.yaml")
    assert main(["protect", path, "--out", str(tmp_path / "release")]) == 0
    assert json.loads((tmp_path / "release/trap2.json").read_text())["surrogates"] == ["a"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*: No such file or directory; check the path"),
        ("a: [", "is not valid YAML: .*; mend that line"),
        ("- a", "holds no settings; start from the examples"),
    ],
)
@pytest.mark.parametrize("command", ["audit", "protect", "surrogates", "sweep"])
def test_a_file_that_holds_no_settings_is_refused(capsys, tmp_path, command, content, message):
    path = tmp_path / "settings.yaml"
    if content is not None:
        path.write_text(content)
    rest = ["release", "--recipe", str(path)] if command == "sweep" else [str(path), "--out", "out"]
    assert main([command, *rest]) == 2
    assert re.search(message, in_one_line(capsys.readouterr().err))


def test_an_output_that_is_a_file_is_refused_before_any_work(capsys, shelf, tmp_path):
    path = written(tmp_path, shelf.audit("lora"))
    assert main(["audit", path, "--out", path]) == 2
    assert "audit.yaml is a file, not a folder" in in_one_line(capsys.readouterr().err)


def test_a_missing_library_is_named_with_the_remedy(capsys, monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "trap2.recipes")
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert main(["audit", "a.yaml", "--out", str(tmp_path / "out")]) == 2
    shown = in_one_line(capsys.readouterr().err)
    assert "audit needs 'yaml', which is not installed; pip install 'trap2[run]'" in shown


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A release with the report of its weights beside it, `../report.json`."""
    release = tmp_path / "release"
    release.mkdir()
    save_file({"w": torch.zeros(2)}, release / "model.safetensors")
    (release / "README.md").write_text("# topics\n")
    digests = {"release": weights_digest(release)}
    build_report().model_copy(update={"digests": digests}).save(tmp_path / "report.json")
    return release


def test_a_report_is_printed_or_drawn_again(capsys, published):
    report = published.parent / "report.json"
    assert main(["report", str(report)]) == 0
    assert capsys.readouterr().out.startswith("Verdict: trec6-protected holds")
    for name in ("a.md", "a.csv", "a.svg"):
        out = report.with_name(name)
        assert main(["report", str(report), "--out", str(out), "--figure", "loss"]) == 0
        assert capsys.readouterr().out == f"written: {out}\n"
        assert out.stat().st_size > 500
    assert main(["report", str(report), "--out", str(report.with_name("a.doc"))]) == 2
    assert "a.doc has no suffix that says a format" in in_one_line(capsys.readouterr().err)


def test_reports_are_compared_in_a_table_and_a_page(capsys, published):
    report, out = str(published.parent / "report.json"), published.parent / "compare.html"
    other = shutil.copy(report, published / "report.json")
    assert main(["compare", report, str(other), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("58.8%") == 2
    page = out.read_text(encoding="utf-8")
    assert page.count("58.8% [2.0%]") == 2
    for name in ("report.json", "release/report.json"):
        assert f"<bdi>{name}</bdi>" in page
    assert main(["compare", report, "--out", str(out.with_suffix(".md"))]) == 2
    assert "compare.md does not end in .html" in in_one_line(capsys.readouterr().err)


def test_a_card_a_list_and_a_check_follow_an_audit(capsys, published):
    release, report = str(published), str(published.parent / "report.json")
    assert main(["card", release, report]) == 0
    assert main(["sign", release]) == 0
    assert main(["verify", release, "--report", report]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"card: {published / 'README.md'}",
        f"3 files listed in {published / 'SHA256SUMS'}",
        "3 files are as SHA256SUMS lists them",
        "no key was given, so this does not say who made them",
        f"{report} is of these weights",
    ]
    save_file({"w": torch.ones(2)}, published / "model.safetensors")
    assert main(["verify", release]) == 2
    assert "changed 'model.safetensors'" in in_one_line(capsys.readouterr().err)
    assert main(["sign", release]) == 0
    assert main(["verify", release, "--report", report]) == 2
    assert "the report is of weights sha256:" in in_one_line(capsys.readouterr().err)
    assert main(["card", release, report]) == 2
    assert "give the report of these weights" in in_one_line(capsys.readouterr().err)


def test_a_signed_release_is_verified_with_the_publishers_key(capsys, published):
    pytest.importorskip("model_signing", reason="model-signing is not installed")
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    private, public = published.parent / "key.pem", published.parent / "key.pub"
    private.write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()))
    public.write_bytes(
        key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
    )
    release = str(published)
    assert main(["sign", release, "--key", str(private)]) == 0
    assert main(["verify", release, "--key", str(public)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"2 files listed in {published / 'SHA256SUMS'}",
        f"signed: {published / 'model.sig'}",
        "2 files are as SHA256SUMS lists them",
        f"every file is as the owner of {public} signed it",
    ]
    (published / "README.md").write_text("# topics, changed\n")
    assert main(["sign", release]) == 0  # the list alone, by whoever changed the card
    assert main(["verify", release, "--key", str(public)]) == 2
    assert "is not as the owner of" in in_one_line(capsys.readouterr().err)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_who_leaves_ends_a_command_in_silence(unbuffered):
    ours, theirs = os.pipe()
    os.close(ours)
    with open(theirs, "wb") as nobody:
        done = subprocess.run(
            [sys.executable, "-m", "trap2", "list", "attacks"],
            stdout=nobody,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            check=False,
        )
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_pipe_that_broke_elsewhere_is_not_hidden(monkeypatch):
    def broken(suite: str | None) -> None:
        raise BrokenPipeError("a worker is gone")

    monkeypatch.setattr("trap2.cli.judging._list_attacks", broken)
    with pytest.raises(BrokenPipeError, match="a worker is gone"):
        main(["list", "attacks"])


def unblock() -> None:
    """A test run in the background would hand its ignored Ctrl-C on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def interrupted(arguments: list[str], at: bytes) -> bytes:
    """What a command prints on stderr that gets a Ctrl-C once it has printed the pattern `at`."""
    with subprocess.Popen(
        [sys.executable, "-m", "trap2", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=unblock,
    ) as running:
        seen = b""
        while not re.search(at, seen):
            piece = os.read(running.stderr.fileno(), 4096)
            assert piece, seen.decode()
            seen += piece
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert err.decode().splitlines()[-1] == "trap2: interrupted; what was finished is kept"
    assert b"Traceback" not in seen + err
    assert out == b""
    return seen + err


def test_ctrl_c_during_an_audit_gives_130_and_leaves_the_ledger(shelf, tmp_path):
    many = [i / 1000 for i in range(2000)]
    path = written(tmp_path, shelf.audit("lora", coefficients=many))
    interrupted(["audit", path, "--out", str(tmp_path / "out")], b"on the release, one coefficient")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["audit.yaml", LEDGER, "out"]


def test_ctrl_c_during_training_gives_130_and_what_was_trained_is_gone_on_with(shelf, tmp_path):
    recipe = pico.recipe(shelf.base, shelf.task("a", described=True), "lora", steps=3000)
    recipe["training"]["evaluate_every"] = 20
    path = written(tmp_path, recipe, "recipe.yaml")
    shown = interrupted(
        ["protect", path, "--out", str(tmp_path / "out")], rb" ([3-9]\d|\d{3,})/3000"
    )
    assert b"trap" in shown
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.work", "recipe.yaml"]
    assert (tmp_path / "out.work" / "checkpoints" / "checkpoint-20").is_dir()
