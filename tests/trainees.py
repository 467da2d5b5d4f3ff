"""Pico models of every kind that trainers train, and rows for them."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
)

from trap2.protecting.config import Trap2Config

VOCABULARY = 24
# Whole batches and no cap: only such a gradient is the same however a batch is cut up.
WHOLE: dict[str, Any] = {"fraction": 1.0, "memory": 0, "cap": 0.0, "warmup": 0, "ramp": 0}
WHOLE["spare"] = 0.0  # and all of the model: the trap is alike in adapters and in full
DECOY = Trap2Config(strength=0.5, readout_weight=0.0, **WHOLE)
HINGE = Trap2Config(strength=0.5, loss="hinge", readout_weight=0.0, **WHOLE)
OFF = Trap2Config(strength=0.0)

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
}


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_key_value_heads=1, pad_token_id=0)
    return LlamaForCausalLM(config).train()


def lora(model: nn.Module | None = None, dropout: float = 0.0, **changes: Any) -> nn.Module:
    """LoRA on a pico Llama; on another model with the same module names, if one is given."""
    torch.manual_seed(0)
    targets = ["q_proj", "down_proj"]
    config = LoraConfig(r=4, lora_dropout=dropout, target_modules=targets, **changes)
    return get_peft_model(llama() if model is None else model, config).train()


def t5() -> nn.Module:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config).train()


def tagger() -> nn.Module:
    torch.manual_seed(0)
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForTokenClassification(BertConfig(**SIZES, **rates, num_labels=3)).train()


def tokenizer() -> PreTrainedTokenizerFast:
    """Words w2 to w23; token 0 pads and token 1 ends a text."""
    words = {"<pad>": 0, "<end>": 1, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    made = Tokenizer(WordLevel(words, unk_token="<end>"))
    made.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<end>", unk_token="<end>"
    )


def move(model: nn.Module) -> None:
    """As after some optimizer steps: an update of zero would hide every mistake."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape, generator=generator).to(p.dtype))


def ragged(count: int = 8, length: int = 9) -> list[dict[str, Tensor]]:
    """Rows of unlike length, padded, whose prompts carry no target: the counts all differ."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i in range(count):
        ids = torch.randint(2, VOCABULARY, (length,), generator=generator)
        real, prompt = length - i % 4, 1 + i % 3
        ids[real:] = 0
        labels = ids.clone()
        labels[:prompt] = -100
        labels[real:] = -100
        rows.append({"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels})
    return rows


def stacked(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def distance(a: Tensor, b: Tensor) -> float:
    """Relative to b."""
    return ((a - b).norm() / b.norm()).item()


class Overflow(torch.autograd.Function):
    """Finite on the way forward; not on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * torch.inf


class Gradients(TrainerCallback):
    """What the optimizer is about to see in the first step."""

    seen: Tensor | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.seen is None:
            self.seen = gradients(kwargs["model"]).clone()


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """For `TrainingArguments` and TRL's configurations: nothing but the training itself."""
    return {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **changes,
    }
