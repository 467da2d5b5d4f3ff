"""What the trap did reaches the trackers that a trainer reports to, beside the trainer's own logs.

`tensorboard` is installed with the tests; the others are read where they are installed, offline.
"""

from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainingArguments

import trainees
from trap2.protecting.config import Trap2Config
from trap2.protecting.trainer import protect_trainer

CONFIG = Trap2Config(strength=0.3, warmup=1, ramp=0, min_rows=2)
NAMES = ("trap_loss", "scale", "strength", "dropped", "eased", "kept", "conflict")
WANTED = {f"trap2/{name}" for name in NAMES}


def trained(folder: Path, tracker: str) -> Any:
    given = trainees.settings(folder / "out", max_steps=3, report_to=[tracker])
    trainer = protect_trainer(Trainer)(
        model=trainees.lora(),
        args=TrainingArguments(**given),
        train_dataset=trainees.ragged(),
        data_collator=trainees.stacked,
        trap2=CONFIG,
    )
    trainer.train()
    return trainer


def test_tensorboard_shows_the_trap_step_by_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = trained(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert {f"train/{name}" for name in WANTED} <= {*events.Tags()["scalars"]}
    shown = {event.step: event.value for event in events.Scalars("train/trap2/trap_loss")}
    logged = {
        entry["step"]: entry["trap2/trap_loss"]
        for entry in trainer.state.log_history
        if "trap2/trap_loss" in entry
    }
    assert shown == pytest.approx(logged)
    assert [*shown] == [2, 3]  # the first step is the warm-up


def test_wandb_offline_shows_the_trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    trainer = trained(tmp_path, "wandb")
    shown = dict(wandb.run.summary)
    wandb.finish()
    assert {f"train/{name}" for name in WANTED} <= {*shown}
    assert shown["train/trap2/trap_loss"] == pytest.approx(trainer.last.trap)


def test_trackio_shows_the_trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))  # read when it is imported
    pytest.importorskip("trackio", reason="trackio is not installed")
    trainer = trained(tmp_path, "trackio")
    from trackio.sqlite_storage import SQLiteStorage

    project = trainer.args.project
    (run,) = SQLiteStorage.get_runs(project)
    shown = [row for row in SQLiteStorage.get_logs(project, run) if "train/trap2/scale" in row]
    assert {f"train/{name}" for name in WANTED} <= {*shown[-1]}
    assert shown[-1]["train/trap2/trap_loss"] == pytest.approx(trainer.last.trap)
