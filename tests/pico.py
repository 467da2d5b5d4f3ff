"""Pico models and tasks made on the fly: real formats, real code paths, seconds on a CPU."""

import csv
import random
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(40)]
CLASSES = ["low", "middle", "high"]


def save_base(folder: Path, seed: int = 0, hidden: int = 16) -> Path:
    """A random two-layer BERT with a word-level tokenizer, as a transformers checkpoint folder."""
    torch.manual_seed(seed)
    vocabulary = {"[PAD]": 0, "[UNK]": 1, **{word: i + 2 for i, word in enumerate(WORDS)}}
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * hidden,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    ).save_pretrained(folder)
    return folder


def write_task(folder: Path, seed: int = 0, rows: int = 96) -> dict[str, str]:
    """Three csv splits whose label can be read off the words; returns {split: path}."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    third = len(WORDS) // 3
    files = {}
    for split, count in (("train", rows), ("validation", rows // 2), ("test", rows // 2)):
        path = folder / f"{split}.csv"
        with path.open("w", newline="") as stream:
            table = csv.writer(stream)
            table.writerow(["text", "label"])
            for i in range(count):
                label = i % 3
                own = draw.choices(WORDS[label * third : (label + 1) * third], k=3)
                noise = draw.choices(WORDS, k=draw.randint(1, 3))
                table.writerow([" ".join(own + noise), label])
        files[split] = str(path)
    return files


def task(name: str, files: dict[str, str], descriptions: bool = True) -> dict:
    """A task section for a recipe or an audit."""
    third = len(WORDS) // 3
    described = [" ".join(WORDS[c * third : c * third + 4]) for c in range(3)]
    return {
        "name": name,
        "data": dict(files),
        "classes": list(CLASSES),
        **({"descriptions": described} if descriptions else {}),
        "max_length": 16,
    }


def recipe(base: Path, spec: dict, method: str = "lora", steps: int = 8, **trap2: object) -> dict:
    """A recipe of a few quick steps."""
    return {
        "base": str(base),
        "task": spec,
        "method": method,
        "lora": {"r": 4, "alpha": 8},
        "training": {
            "steps": steps,
            "batch_size": 8,
            "learning_rate": 0.01,
            "lr_warmup_steps": 1,
            "evaluate_every": max(1, steps // 2),
        },
        "trap2": {"warmup": 1, "ramp": 1, **trap2},
    }


def write_yaml(path: Path, content: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path
