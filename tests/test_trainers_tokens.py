"""Models that predict tokens: targets, padding, prompts, and the mean over tokens."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

import trainees
from trainees import DECOY, OFF, distance, gradients, llama, lora, move, ragged, stacked, t5, tagger
from trap2.protecting.config import Trap2Config
from trap2.protecting.protector import Protector, default_forward
from trap2.protecting.tokens import shifts_labels, target_count, targets_per_row
from trap2.protecting.trainer import protect_trainer


@pytest.mark.parametrize("make", [llama, lora, t5, tagger])
def test_the_trap_reads_the_logits_that_the_models_own_loss_reads(
    make: Callable[[], nn.Module],
) -> None:
    """Cross-entropy of the positions the trap sees, with their labels, is the model's loss."""
    batch = stacked(ragged())
    if make is tagger:
        batch["labels"] = batch["labels"].where(batch["labels"] < 0, batch["labels"] % 3)
    outcome = default_forward(make(), batch)
    logits, labels = outcome.rows()
    torch.testing.assert_close(F.cross_entropy(logits, labels), outcome.loss)
    assert len(labels) == target_count(batch, outcome.shifted)
    assert outcome.shifted == (make in (llama, lora))


def test_a_model_from_elsewhere_is_taken_to_shift_its_labels() -> None:
    assert shifts_labels(nn.Linear(2, 2))
    assert shifts_labels(torch.compile(llama(), backend="eager"))
    assert not shifts_labels(torch.compile(tagger(), backend="eager"))


def test_targets_are_counted_as_the_loss_counts_them() -> None:
    labels = torch.tensor([[5, 6, -100], [-100, 7, 8]])
    assert target_count({"labels": labels}, True) == 3
    assert target_count({"labels": labels}, False) == 4
    assert target_count({"labels": labels, "shift_labels": labels[:1]}, True) == 2
    assert target_count({"labels": torch.tensor([1, -100, 0])}, True) == 2


def test_rows_of_many_targets_are_fewer_in_the_trap_pass() -> None:
    """A fifth of six rows of eight tokens is one row; with one target a row it takes all six."""
    ids = torch.arange(48).reshape(6, 8) % 20
    seen: list[int] = []

    def counted(model: nn.Module, batch: Any) -> Any:
        seen.append(len(batch["input_ids"]))
        return default_forward(model, batch)

    for labels in (ids, ids.masked_fill(torch.arange(8) < 7, -100), torch.zeros(6, 8)):
        batch = {"input_ids": ids, "labels": labels}
        assert targets_per_row(batch, True) == (7.0 if labels is ids else 1.0)
    assert targets_per_row({"labels": ids[0]}, True) == targets_per_row({}, True) == 1.0
    protector = Protector(llama(), Trap2Config(warmup=0, ramp=0), forward=counted)
    protector.backward({"input_ids": ids, "labels": ids})
    protector.backward({"input_ids": ids, "labels": ids.masked_fill(torch.arange(8) < 7, -100)})
    assert seen == [6, 1, 6, 6]


@pytest.mark.parametrize("loss", ["decoy", "unlikelihood", "hinge", "ascent"])
def test_padding_and_prompts_change_nothing(loss: str) -> None:
    """Three more padded positions, and other words where there is no target to the left of one."""

    def run(batch: dict[str, Tensor]) -> tuple[Tensor, Any]:
        model = llama()
        settings = {"loss": loss, "readout_weight": 1.0, "warmup": 0, "ramp": 0}
        protector = Protector(model, Trap2Config(**settings))
        move(model)
        protector.backward(batch)
        return gradients(model), protector.last

    batch = stacked(ragged())
    padded = {
        key: F.pad(value, (0, 3), value=-100 if key == "labels" else 0)
        for key, value in batch.items()
    }
    short, record = run(batch)
    long, longer = run(padded)
    assert longer.trap == pytest.approx(record.trap, rel=1e-5)
    assert distance(long, short) < 1e-5


@pytest.mark.parametrize("make", [llama, lora])
@pytest.mark.parametrize("form", ["trainer", "loop"])
def test_every_target_token_counts_alike_under_accumulation(
    make: Callable[[], nn.Module], form: str, tmp_path: Path
) -> None:
    """1 x 8 rows = 8 x 1, for the nominal loss and for the trap, though the token counts differ."""
    data = ragged()

    def trained(rows: int, config: Trap2Config) -> Tensor:
        args = trainees.settings(
            tmp_path, per_device_train_batch_size=rows, gradient_accumulation_steps=8 // rows
        )
        model, seen = make(), trainees.Gradients()
        trainer = protect_trainer(Trainer)(
            model=model,
            args=TrainingArguments(**args),
            train_dataset=data,
            trap2=config,
            callbacks=[seen],
        )
        move(model)
        trainer.train()
        assert seen.seen is not None
        return seen.seen

    def looped(rows: int, config: Trap2Config) -> Tensor:
        model = make()
        protector = Protector(model, config, accumulation_steps=8 // rows)
        move(model)
        whole = target_count(stacked(data), True)
        for start in range(0, 8, rows):
            batch = stacked(data[start : start + rows])
            protector.backward(batch, share=target_count(batch, True) / whole)
        return gradients(model)

    run = trained if form == "trainer" else looped
    plain_whole, plain_parts = run(8, OFF), run(1, OFF)
    assert distance(plain_parts, plain_whole) < 1e-5
    trap_whole, trap_parts = run(8, DECOY) - plain_whole, run(1, DECOY) - plain_parts
    assert trap_whole.norm() > 0.01 * plain_whole.norm()
    assert distance(trap_parts, trap_whole) < 1e-4


def test_a_part_of_the_rows_still_counts_for_all_of_them(tmp_path: Path) -> None:
    """Half of eight equal rows gives the trap gradient of all eight."""

    def run(config: Trap2Config) -> Tensor:
        model, seen = lora(), trainees.Gradients()
        args = trainees.settings(tmp_path, per_device_train_batch_size=8)
        trainer = protect_trainer(Trainer)(
            model=model,
            args=TrainingArguments(**args),
            train_dataset=ragged(1) * 8,
            trap2=config,
            callbacks=[seen],
        )
        move(model)
        trainer.train()
        assert seen.seen is not None
        return seen.seen

    whole = Trap2Config(strength=0.5, readout_weight=0.0, fraction=1.0, cap=0.0, warmup=0, ramp=0)
    half = Trap2Config(strength=0.5, readout_weight=0.0, warmup=0, ramp=0, fraction=0.5, cap=0.0)
    assert distance(run(half), run(whole)) < 1e-5
    assert distance(run(OFF), run(whole)) > 1e-2


def test_sequence_to_sequence_training_is_protected(tmp_path: Path) -> None:
    """The gradient is that of a loop on the same rows; labels are not shifted against logits."""
    rows, seen = ragged(4), trainees.Gradients()
    trap2 = Trap2Config(loss="unlikelihood", readout_weight=1.0, warmup=0, ramp=0, fraction=1.0)
    trainer = protect_trainer(Seq2SeqTrainer)(
        model=t5(),
        args=Seq2SeqTrainingArguments(**trainees.settings(tmp_path)),
        train_dataset=rows,
        eval_dataset=rows,
        trap2=trap2,
        callbacks=[seen],
    )
    move(trainer.model)
    (batch,) = trainer.get_train_dataloader()
    trainer.train()
    assert "eval_loss" in trainer.evaluate()
    model = t5()
    protector = Protector(model, trap2)
    move(model)
    protector.backward(batch)
    assert protector.last is not None
    assert trainer.last.trap == pytest.approx(protector.last.trap, rel=1e-4)
    assert seen.seen is not None
    assert distance(seen.seen, gradients(model)) < 1e-4


DATA = os.environ.get("TRAP2_DATA")


@pytest.mark.skipif(DATA is None, reason="TRAP2_DATA names no folder with a language model")
def test_a_real_language_model_learns_at_its_own_scale_and_not_off_it() -> None:
    """The trap keeps the loss at half the scale above what the same run without a trap leaves."""
    folder = Path(str(DATA))
    tokenizer = AutoTokenizer.from_pretrained(folder / "models/stories260k")
    text = (folder / "text/tinyshakespeare/input.txt").read_text()[:40_000]
    ids = torch.tensor(tokenizer(text)["input_ids"])
    blocks = ids[: len(ids) // 48 * 48].view(-1, 48)

    def run(strength: float) -> tuple[list[float], float]:
        model = AutoModelForCausalLM.from_pretrained(folder / "models/stories260k").train()
        config = Trap2Config(
            strength=strength, loss="hinge", readout_weight=0.0, warmup=5, ramp=5, fraction=0.5
        )
        protector = Protector(model, config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for step in range(40):
            rows = blocks[8 * step % 160 :][:8]
            losses.append(float(protector.backward({"input_ids": rows, "labels": rows})))
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad(), protector.update.at(0.5):
            off = model(input_ids=blocks[160:176], labels=blocks[160:176]).loss.item()
        return losses, off

    losses, off = run(0.5)
    _, control = run(0.0)
    assert sum(losses[-4:]) / 4 < sum(losses[:4]) / 4 - 0.5  # 3.6 to 2.8 nats a token
    assert off > control + 0.2  # 3.6 and 3.3
