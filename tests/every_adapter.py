"""Every kind of adapter on a pico BERT: what tests of updates and of protection walk through."""

from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertModel

TARGETS = ["query", "value", "output.dense"]


def bert() -> Any:
    """Without dropout, and with biases and norms that are not what they are initialised to."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=24,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        initializer_range=0.3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model.train()


def lora(**changes: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": 2, "target_modules": TARGETS, **changes}


def other(kind: str, **changes: Any) -> dict[str, Any]:
    return {"peft_type": kind, "target_modules": TARGETS, **changes}


LORA: dict[str, dict[str, Any]] = {
    "LoRA": lora(),
    "rsLoRA": lora(use_rslora=True, lora_alpha=3),
    "LoRA with a bias": lora(lora_bias=True),
    "LoRA and all biases": lora(bias="all"),
    "LoRA and its biases": lora(bias="lora_only"),
    "LoRA and a module": lora(modules_to_save=["pooler"]),
    "LoRA and tokens": lora(trainable_token_indices={"word_embeddings": [1, 5]}),
    "LoRA, orthogonal": lora(init_lora_weights="orthogonal"),
    "LoRA, gaussian": lora(init_lora_weights="gaussian"),
    "LoRA, eva": lora(init_lora_weights="eva"),
    "LoRA, mica": lora(init_lora_weights="mica"),
}
"""What is scaled in place."""

OTHERS: dict[str, dict[str, Any]] = {
    "DoRA": lora(use_dora=True),
    "DoRA on an embedding": lora(use_dora=True, target_modules=["query", "word_embeddings"]),
    "DoRA and a module": lora(use_dora=True, modules_to_save=["pooler"], bias="all"),
    "PiSSA": lora(init_lora_weights="pissa"),
    "OLoRA": lora(init_lora_weights="olora"),
    "AdaLoRA": other("ADALORA", init_r=2, target_r=1, total_step=10),
    "BEFT": other("BEFT"),
    "BOFT": other("BOFT", boft_block_size=4),
    "C3A": other("C3A", block_size=4),
    "DEFT": other("DEFT", r=2),
    "DeLoRA": other("DELORA", r=2),
    "FourierFT": other("FOURIERFT", n_frequency=9),
    "FRoD": other("FROD", progressbar=False),
    "GLoRA": other("GLORA", r=2),
    "GraLoRA": other("GRALORA", r=4),
    "HiRA": other("HIRA", r=2),
    "HRA": other("HRA", r=2),
    "IA3": other("IA3", feedforward_modules=["output.dense"]),
    "layer norms": other("LN_TUNING", target_modules=["LayerNorm"]),
    "LoHa": other("LOHA", r=2),
    "LoKr": other("LOKR", r=2, modules_to_save=["pooler.dense"]),
    "MiSS": other("MISS", r=2),
    "OFT": other("OFT", oft_block_size=4),
    "OSF": other("OSF"),
    "PEANuT": other("PEANUT", r=2),
    "PSOFT": other("PSOFT", r=2),
    "RandLoRA": other("RANDLORA", r=2),
    "RoAd": other("ROAD", group_size=4),
    "SHiRA": other("SHIRA", r=2),
    "SuperTuning": other("SUPERTUNING"),
    "tokens": other("TRAINABLE_TOKENS", target_modules=["word_embeddings"], token_indices=[1, 5]),
    "VBLoRA": other("VBLORA", r=2, num_vectors=5, vector_length=4, topk=2),
    "VeRA": other("VERA", r=4),
    "WaveFT": other("WAVEFT", n_frequency=9),
}

EVERY = {**LORA, **OTHERS}


def adapted(name: str, model: nn.Module | None = None) -> nn.Module:
    """A fresh adapter on the model."""
    torch.manual_seed(1)
    config = PeftConfig.from_peft_type(**EVERY[name])
    return get_peft_model(bert() if model is None else model, config).train()


def move(model: nn.Module, amount: float = 0.1) -> None:
    """As after some optimizer steps."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                step = amount * torch.randn(parameter.shape, generator=generator)
                parameter.add_(step.to(parameter.dtype))
