"""What a second worker is worth: the same audit by one process and by two workers.

    python benchmarks/workers.py                 # MiniLM's shape, random weights, one thread each

An encoder of MiniLM's shape, two LoRA updates and a control with random weights, rows of random
words: what merging and evaluating cost does not depend on what a model knows. Each round audits it
twice, in an order that alternates: by one process on one thread, and by two workers on one thread
each while this process writes the ledger. Workers are started beforehand (that is measured apart)
and the two records are compared. The speed-up is the median of the paired ratios. Writes
`results/workers.json`.
"""

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from trap2.auditing.arena import Arena
from trap2.auditing.audit import audit
from trap2.auditing.ledger import Ledger
from trap2.auditing.workers import Workers
from trap2.files import write_json, write_text
from trap2.provenance import machine, now, versions
from trap2.recipes import AuditSpec
from trap2.schema import Report

OUT = Path(__file__).parent.parent / "results" / "workers.json"
WORDS = [f"w{place}" for place in range(1000)]
CLASSES = 4


def main() -> None:
    """Measure and write the results."""
    chosen = _arguments()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        spec = _spec(Path(place), chosen)
        rounds = [_round(spec, Path(place), number, chosen) for number in range(chosen.rounds)]
    ratios = [one["one_process"] / one["workers"] for one in rounds]
    speedup = round(statistics.median(ratios), 2)
    record = {
        "figures": {"two_workers_speedup": speedup} if chosen.workers == 2 else {},
        "command": " ".join(["python benchmarks/workers.py", *map(shlex.quote, sys.argv[1:])]),
        "notes": chosen.note,
        "workers": chosen.workers,
        "speedup": speedup,
        "rounds": rounds,
        "attacker": spec.attacker.model_dump(mode="json"),
        "machine": machine(),
        "versions": versions(),
        "created": now(),
    }
    write_json(chosen.out, record)
    print(json.dumps(record, indent=2))


def _arguments() -> argparse.Namespace:
    top = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    top.add_argument("--workers", type=int, default=2)
    top.add_argument("--rounds", type=int, default=3)
    top.add_argument("--layers", type=int, default=6)
    top.add_argument("--hidden", type=int, default=384)
    top.add_argument("--rows", type=int, default=100, help="validation rows, and test rows")
    top.add_argument("--words", type=int, default=30, help="in each row")
    top.add_argument("--values", type=int, default=12, help="shared coefficients tried")
    top.add_argument("--note", default="", help="what else the machine was doing")
    top.add_argument("--out", type=Path, default=OUT)
    return top.parse_args()


def _round(
    spec: AuditSpec, folder: Path, number: int, chosen: argparse.Namespace
) -> dict[str, Any]:
    """Seconds of both, after the workers have loaded what they need."""
    measured: dict[str, Any] = {}
    reports: list[Report] = []
    started = time.perf_counter()
    with Workers(spec, chosen.workers, threads=1) as workers:
        with Ledger(folder / f"first{number}") as ledger:
            arena = Arena(spec, ledger=ledger, crew=workers)
            # One short job for each worker, and some, so that all have loaded the audit.
            scales = [0.01 * k for k in range(4 * chosen.workers)]
            arena.prepare([(arena.alone("release", s), "release", "test") for s in scales])
        measured["start_of_workers"] = time.perf_counter() - started
        kinds = [("one_process", None), ("workers", workers)]
        for kind, crew in kinds if number % 2 else reversed(kinds):
            begun = time.perf_counter()
            with Ledger(folder / f"{kind}{number}") if crew else nullcontext() as ledger:
                reports.append(audit(spec, ledger=ledger, crew=crew))
            measured[kind] = time.perf_counter() - begun
    same = [r.model_dump_json(exclude={"created", "seconds"}) for r in reports]
    if same[0] != same[1]:
        sys.exit("the records differ")
    found = {key: round(seconds, 2) for key, seconds in measured.items()}
    return {**found, "evaluations": reports[0].rows["evaluations"]}


def _spec(folder: Path, chosen: argparse.Namespace) -> AuditSpec:
    """Everything an audit reads, with random weights."""
    vocabulary = {"[PAD]": 0, "[UNK]": 1, **{word: i + 2 for i, word in enumerate(WORDS)}}
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30522,
        hidden_size=chosen.hidden,
        num_hidden_layers=chosen.layers,
        num_attention_heads=12,
        intermediate_size=4 * chosen.hidden,
    )
    BertModel(config).save_pretrained(folder / "base")
    words = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_max_length=128
    ).save_pretrained(folder / "base")
    for name in ("release", "control", "partner"):
        _update(folder, name)
    files = {split: str(_rows(folder / f"{split}.csv", chosen)) for split in ("validation", "test")}

    def task(name: str) -> dict[str, Any]:
        described = [" ".join(WORDS[c::CLASSES][:6]) for c in range(CLASSES)]
        classes = [f"class {c}" for c in range(CLASSES)]
        return {"name": name, "data": files, "classes": classes, "descriptions": described}

    values = [round(1.5 * (k + 1) / chosen.values, 4) for k in range(chosen.values)]
    content = {
        "base": str(folder / "base"),
        "release": {"path": str(folder / "release"), "task": task("a")},
        "control": str(folder / "control"),
        "partners": [{"path": str(folder / "partner"), "task": task("b")}],
        "attacker": {
            "attacks": ["task_arithmetic", "ties"],
            "t3_attacks": ["task_arithmetic"],
            "coefficients": values,
            "grids": {"ties": {"density": [0.2]}},
            "relabel_rows": [30],
            "validation_rows": chosen.rows,
            "test_rows": chosen.rows,
        },
    }
    return AuditSpec.model_validate(content)


def _update(folder: Path, name: str) -> None:
    """A LoRA update with random factors."""
    model = BertModel.from_pretrained(folder / "base")
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.02)
    adapted.save_pretrained(folder / name)


def _rows(path: Path, chosen: argparse.Namespace) -> Path:
    """Rows of random words; a task has no row for training here."""
    lines = ["text,label"]
    for row in range(chosen.rows):
        drawn = torch.randint(len(WORDS), (chosen.words,)).tolist()
        lines.append(" ".join(WORDS[place] for place in drawn) + f",{row % CLASSES}")
    write_text(path, "\n".join(lines) + "\n")
    return path


if __name__ == "__main__":
    main()
