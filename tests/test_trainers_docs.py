"""The examples of docs/trainers.md are run as they stand, on pico models, a few steps each."""

import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForSequenceClassification

import trainees
from trainees import llama, lora, ragged, t5
from trap2.protecting.config import Trap2Config

TEXT = (Path(__file__).parent.parent / "docs" / "trainers.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
STEPS = 4


def scorer() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(**trainees.SIZES, num_key_value_heads=1, pad_token_id=0, num_labels=1)
    return LlamaForSequenceClassification(config)


def preferences() -> Dataset:
    row = {"prompt": "w2 w3", "chosen": " w4 w5", "rejected": " w6"}
    return Dataset.from_list([row] * 8)


def completions() -> Dataset:
    return Dataset.from_list([{"prompt": "w2 w3", "completion": " w4 w5 w6"}] * 8)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "Protector(model, accumulation_steps=4)": (lora, ragged),
    "GradScaler": (lora, ragged),
    "Accelerator(": (lora, ragged),
    "protect_trainer(Trainer)": (lora, ragged),
    "Seq2SeqTrainer": (t5, ragged),
    "SFTTrainer": (lora, completions),
    "DPOTrainer": (lora, preferences),
    "RewardTrainer": (scorer, preferences),
    "lightning": (lora, ragged),
    "DistributedDataParallel": (lora, ragged),
    "fully_shard": (llama, ragged),
}
SEVERAL = ("DistributedDataParallel", "fully_shard")


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """What torchrun would set for a single process; whatever group was made is taken down."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in given.items():
        monkeypatch.setitem(os.environ, name, value)
    yield
    torch.distributed.destroy_process_group()


def example(mark: str) -> str:
    (found,) = [code for code in EXAMPLES if mark in code]
    return found


def run(mark: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, rows = CASES[mark]
    code = example(mark).replace("max_steps=600", f"max_steps={STEPS}")
    for settings in (
        "TrainingArguments",
        "SFTConfig",
        "DPOConfig",
        "RewardConfig",
    ):
        code = code.replace(f'{settings}("out", ', f'{settings}("out", **quick, ')
    model, data = make(), rows()
    before = trainees.weights(model)
    names = {
        "model": model,
        "data": data,
        "tokenizer": trainees.tokenizer(),
        "loader": torch.utils.data.DataLoader(list(data) * 2, batch_size=4),
        "quick": {
            key: value
            for key, value in trainees.settings(folder).items()
            if key not in ("output_dir", "max_steps", "learning_rate")
        },
    }
    monkeypatch.chdir(folder)
    # Pico runs are over before the default warm-up is.
    monkeypatch.setattr(Trap2Config, "strength_at", lambda self, step: self.strength)
    AcceleratorState._reset_state(reset_partial_state=True)
    exec(code, names)  # the document's own code, that is the test
    held = names["trainer" if "trainer" in names else "protector"]
    record = (held.lightning_module.protector if mark == "lightning" else held).last
    assert record.trap is not None
    trained = {name: whole(p) for name, p in model.named_parameters()}
    assert any(not torch.equal(value, before[name]) for name, value in trained.items())


def whole(p: Any) -> Tensor:
    return (p.full_tensor() if hasattr(p, "full_tensor") else p).detach()


def test_the_schedule_is_the_defaults() -> None:
    default = Trap2Config()
    schedule = (
        f"off for the first {default.warmup} steps, grows over {default.ramp} more and closes in "
        f"on scale 1 over {default.closing} after those;"
    )
    assert schedule in " ".join(TEXT.split())


def test_every_example_has_a_case_and_is_short() -> None:
    assert len(EXAMPLES) == len(CASES)
    assert {example(mark) for mark in CASES} == set(EXAMPLES)
    assert max(len(code.splitlines()) for code in EXAMPLES) < 60


@pytest.mark.parametrize("mark", [mark for mark in CASES if mark not in SEVERAL])
def test_the_example_trains(mark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(mark, tmp_path, monkeypatch)


@pytest.mark.parametrize("mark", SEVERAL)
def test_the_example_for_several_processes_trains(
    mark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_process: None
) -> None:
    run(mark, tmp_path, monkeypatch)
