"""TRL's trainers, and what goes wrong in them without a word."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForSequenceClassification
from trl import (
    DistillationTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

import trainees
from trainees import DECOY, HINGE, OFF, distance, gradients, llama, lora, move
from trap2.errors import Unsupported, UserError
from trap2.protecting.config import Trap2Config
from trap2.protecting.protector import Protector
from trap2.protecting.trainer import COUNTERS, protect_trainer


def words(start: int, count: int) -> str:
    return " ".join(f"w{2 + (start + i) % 22}" for i in range(count))


def conversations(rows: int = 8) -> Dataset:
    """Prompts and completions of unlike length."""
    return Dataset.from_list(
        [
            {"prompt": words(i, 2 + i % 3), "completion": " " + words(3 * i, 2 + i % 4)}
            for i in range(rows)
        ]
    )


def preferences(rows: int = 8) -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": words(i, 2 + i % 3),
                "chosen": " " + words(5 * i, 2 + i % 2),
                "rejected": " " + words(7 * i + 3, 3),
            }
            for i in range(rows)
        ]
    )


def scorer() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(**trainees.SIZES, num_key_value_heads=1, pad_token_id=0, num_labels=1)
    return LlamaForSequenceClassification(config).train()


def trainer_of(kind: str, folder: Path, trap2: Trap2Config | None, **changes: Any) -> Any:
    """A trainer of the kind; TRL's own without a trap2."""
    model = changes.pop("model", None)
    common = {"gradient_checkpointing": False, "max_length": None, **changes}
    args = trainees.settings(folder, **common)
    classes: dict[str, tuple[type, Any, Callable[[], Dataset], Callable[[], nn.Module]]] = {
        "sft": (SFTTrainer, SFTConfig, conversations, lora),
        "dpo": (DPOTrainer, DPOConfig, preferences, lora),
        "reward": (RewardTrainer, RewardConfig, preferences, scorer),
    }
    trainer_class, settings, data, make = classes[kind]
    more = {} if trap2 is None else {"trap2": trap2}
    return (trainer_class if trap2 is None else protect_trainer(trainer_class))(
        model=make() if model is None else model,
        args=settings(**args),
        train_dataset=data(),
        processing_class=trainees.tokenizer(),
        **more,
    )


def first_gradient(kind: str, folder: Path, trap2: Trap2Config, **changes: Any) -> Tensor:
    trainer, seen = trainer_of(kind, folder, trap2, **changes), trainees.Gradients()
    trainer.add_callback(seen)
    move(trainer.model)
    trainer.train()
    assert seen.seen is not None
    return seen.seen


def batches_of(trainer: Any) -> list[dict[str, Tensor]]:
    """Will hold the micro-batches as training meets them."""
    batches: list[dict[str, Tensor]] = []
    step = trainer.training_step

    def watching(model: nn.Module, inputs: dict[str, Tensor], *more: Any) -> Tensor:
        batches.append(dict(inputs))
        return step(model, inputs, *more)

    trainer.training_step = watching
    return batches


KINDS = {"sft": DECOY, "dpo": HINGE, "reward": HINGE}


@pytest.mark.parametrize("kind", list(KINDS))
def test_strength_zero_is_trls_own_training(kind: str, tmp_path: Path) -> None:
    def run(trap2: Trap2Config | None) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
        trainer = trainer_of(kind, tmp_path, trap2, max_steps=2)
        trainer.train()
        return trainees.weights(trainer.model), trainer.state.log_history

    plain, logs = run(None)
    off, off_logs = run(OFF)
    assert all(torch.equal(value, off[name]) for name, value in plain.items())
    timed = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
    for ours, theirs in zip(off_logs, logs, strict=True):
        assert {k: v for k, v in ours.items() if k not in timed} == {
            k: v for k, v in theirs.items() if k not in timed
        }


@pytest.mark.parametrize("kind", list(KINDS))
def test_trls_own_numbers_are_those_of_the_nominal_passes(kind: str, tmp_path: Path) -> None:
    """Without care token counts double, and losses, entropies and margins are averages of both."""
    trap2 = Trap2Config(**{**vars(KINDS[kind]), "scales_per_step": 2, "strength": 1e-12})
    logs: list[list[dict[str, float]]] = []
    for config in (trap2, OFF):
        trainer = trainer_of(kind, tmp_path, config, max_steps=2, gradient_accumulation_steps=2)
        assert all(hasattr(trainer, name) for name in COUNTERS if kind != "dpo")
        trainer.train()
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
    protected, plain = logs
    assert len(plain) == 2
    for ours, theirs in zip(protected, plain, strict=True):
        assert ours["trap2/trap_loss"] != ours["loss"]
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=1e-5, abs=1e-9), key


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The gradient of one batch of four rows, by kind, where the trap plays a part in it."""
    folder, found = tmp_path_factory.mktemp("whole"), {}
    for kind, trap2 in KINDS.items():
        found[kind] = first_gradient(kind, folder, trap2)
        assert distance(first_gradient(kind, folder, OFF), found[kind]) > 1e-2
    return found


OTHERWISE: dict[str, dict[str, Any]] = {
    "four micro-batches": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    "checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "reentrant checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
}


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("way", list(OTHERWISE))
def test_checkpointing_and_accumulation_change_no_gradient(
    kind: str, way: str, whole: dict[str, Tensor], tmp_path: Path
) -> None:
    """The hinge stays below its cap in every micro-batch, so that its parts add up."""
    gradient = first_gradient(kind, tmp_path, KINDS[kind], **OTHERWISE[way])
    assert distance(gradient, whole[kind]) < 1e-4


def test_fine_tuning_on_completions_is_the_hand_written_loop(tmp_path: Path) -> None:
    """Full fine-tuning, the default losses with the read-out, half of the rows."""
    trap2 = Trap2Config(warmup=0, ramp=0, fraction=0.5)
    trainer, seen = trainer_of("sft", tmp_path, trap2, model=llama()), trainees.Gradients()
    trainer.add_callback(seen)
    batches = batches_of(trainer)
    trainer.train()
    (batch,) = batches
    assert (batch["labels"] == -100).any()
    model = llama()
    Protector(model, trap2).backward(batch)
    assert seen.seen is not None
    assert distance(gradients(model), seen.seen) < 1e-4


def test_an_adapter_made_by_the_trainer_is_protected(tmp_path: Path) -> None:
    trainer = protect_trainer(SFTTrainer)(
        model=llama(),
        args=SFTConfig(**trainees.settings(tmp_path, max_steps=2)),
        train_dataset=conversations(),
        processing_class=trainees.tokenizer(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
        trap2=DECOY,
    )
    assert all("lora_B" in item.name for item in trainer.update.shared)
    trainer.train()
    assert trainer.last.trap is not None


def test_packed_rows_are_protected(tmp_path: Path) -> None:
    trainer = trainer_of(
        "sft", tmp_path, DECOY, packing=True, packing_strategy="wrapped", max_length=8, max_steps=2
    )
    trainer.train()
    assert trainer.last.trap is not None


def margins(kind: str, trainer: Any, batch: dict[str, Tensor], s: float) -> Tensor:
    """What the loss of each pair is the -log sigmoid of, at a scale; the base is the reference."""
    given = {k: batch[k] for k in ("input_ids", "attention_mask")}
    scores = []
    for scale in (s, 0.0):
        with torch.no_grad(), trainer.update.at(scale):
            logits = trainer.model(**given).logits
        if kind == "dpo":
            said = logits[:, :-1].log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])
            logits = (said[..., 0] * batch["completion_mask"][:, 1:]).sum(1, keepdim=True)
        chosen, rejected = logits[:, 0].chunk(2)
        scores.append(chosen - rejected)
    assert len(scores[0]) == 4
    return trainer.beta * (scores[0] - scores[1]) if kind == "dpo" else scores[0]


@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_half_of_the_preference_rows_is_half_of_the_pairs(kind: str, tmp_path: Path) -> None:
    """The trap of half the pairs is the loss of these pairs at that scale, computed by hand."""
    trap2 = Trap2Config(**{**vars(HINGE), "loss": "ascent", "fraction": 0.5, "min_rows": 1})
    trainer = trainer_of(kind, tmp_path, trap2)
    move(trainer.model)
    batches = batches_of(trainer)
    before = trainees.weights(trainer.model)
    trainer.train()
    trainer.model.load_state_dict(before)
    batch, (s,) = batches[0], trainer.last.scales
    every = F.logsigmoid(margins(kind, trainer, batch, s))
    expected = every[1::2].mean()  # spread over the batch
    assert trainer.last.trap == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_preferences_need_a_trap_that_reads_the_loss_alone(kind: str, tmp_path: Path) -> None:
    """Said in the first step, not when the warm-up ends."""
    trainer = trainer_of(kind, tmp_path, Trap2Config(warmup=100))
    with pytest.raises(UserError, match="the model gives none; use loss=hinge with readout_w"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("trainer_class", [GRPOTrainer, RLOOTrainer, DistillationTrainer])
def test_generating_trainers_are_refused(trainer_class: type) -> None:
    with pytest.raises(Unsupported, match=f"{trainer_class.__name__} generates its batches in"):
        protect_trainer(trainer_class)
