"""What a protected step costs beside a plain one, in time and in memory.

    python benchmarks/step_cost.py             # CPU: MiniLM, a 100 M decoder, MobileNetV2 in shape
    python benchmarks/step_cost.py --models llama-1b llama-1b-wide llama-8b --device cuda

Random weights of real shapes: cost does not depend on what a model knows. Each model is trained
with LoRA and in full by several kinds of step, on the same batches, alternating in one process:

    plain      forward, backward, clip, optimizer step
    protected  the same with the default trap
    one_pass   with the trap's rows in the nominal pass (LoRA alone)
    from_files protected, the start of training read from the base's files (in full alone)
    all_rows   the trap on every row, without a cap
    paper      the setting of arXiv 2601.21898 with this package: every row twice
    two_pass   that objective written down directly: a second set of scaled weights through
               `torch.func.functional_call`

Time is the median of the paired ratios. Memory is the peak of a process that runs one kind of step
only, above what the imports take, with blocks that go back to the system when they are freed: what
the C library keeps of them for later depends on their order and can be a fifth of the peak (on a
GPU: the allocator's peak while it runs one kind). Writes `results/step_cost.json`.
"""

import argparse
import gc
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    MobileNetV2Config,
)

from trap2.files import read_json, write_json
from trap2.protecting.config import Trap2Config
from trap2.protecting.protector import Protector
from trap2.protecting.scaled import LiveUpdate
from trap2.provenance import machine, versions

OUT = Path(__file__).parent.parent / "results" / "step_cost.json"
STEPS = ("plain", "protected", "one_pass", "from_files")
STEPS += ("all_rows", "paper", "two_pass")
ONLY = {"one_pass": "lora", "from_files": "full"}
"""Kinds of step that one way of training has."""


@dataclass(frozen=True)
class Shape:
    """A model's shape and its batch.

    Rows of so many tokens, or padded ones of so many at most; or square images of so many pixels,
    for a network that normalises by the batch: its trap sees every row.
    """

    config: Any
    rows: int
    tokens: int
    classes: int = 0
    padded: bool = False
    pixels: int = 0


def _llama(hidden: int, layers: int, heads: int, vocabulary: int, inner: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        intermediate_size=inner,
        vocab_size=vocabulary,
    )


MINILM = BertConfig(
    hidden_size=384,
    num_hidden_layers=6,
    num_attention_heads=12,
    intermediate_size=1536,
    num_labels=6,
)
MOBILENET = MobileNetV2Config(depth_multiplier=0.35, image_size=96, num_labels=10)
SHAPES = {
    "pico": Shape(_llama(32, 2, 4, 100, 64), 5, 16),
    "minilm": Shape(MINILM, 32, 32, classes=6),
    "minilm-text": Shape(MINILM, 32, 48, classes=6, padded=True),
    "decoder-100m": Shape(_llama(768, 12, 12, 16_000, 2048), 10, 64),
    "decoder-100m-wide": Shape(_llama(768, 12, 12, 16_000, 2048), 32, 64),
    "mobilenet": Shape(MOBILENET, 32, 0, classes=10, pixels=96),
    "llama-1b": Shape(_llama(2048, 16, 32, 128_256, 8192), 10, 1024),
    "llama-1b-wide": Shape(_llama(2048, 16, 32, 128_256, 8192), 32, 1024),
    "llama-8b": Shape(_llama(4096, 32, 32, 128_256, 14_336), 5, 1024),
}
DEFAULT = ["minilm", "minilm-text", "decoder-100m", "decoder-100m-wide", "mobilenet"]


def build(shape: Shape, method: str, device: str) -> nn.Module:
    """A model of random weights, trained with LoRA (r = 16, all linear layers) or in full."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    kind: Any = AutoModelForSequenceClassification if shape.classes else AutoModelForCausalLM
    if shape.pixels:
        kind = AutoModelForImageClassification
    with torch.device(device):  # drawn where they are: an 8 B model takes a minute otherwise
        model: nn.Module = kind.from_config(shape.config, dtype=dtype)
    if method == "lora":
        adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
        model = get_peft_model(model, adapter)  # type: ignore[arg-type]
    return model.train()


def batches(shape: Shape, count: int, device: str) -> list[dict[str, Tensor]]:
    """Random images, or random tokens in whole rows or padded to the longest.

    Lengths are those of sentences: log-normal, the median a third of the most, 1 % that long.
    """
    generator = torch.Generator().manual_seed(1)

    def drawn(high: int, *size: int) -> Tensor:
        return torch.randint(0, high, size, generator=generator).to(device)

    found = []
    for _ in range(count):
        if shape.pixels:
            images = torch.randn(shape.rows, 3, shape.pixels, shape.pixels, generator=generator)
            labels = drawn(shape.classes, shape.rows)
            found.append({"pixel_values": images.to(device), "labels": labels})
            continue
        ids = drawn(shape.config.vocab_size, shape.rows, shape.tokens)
        labels = drawn(shape.classes, shape.rows) if shape.classes else ids
        mask = torch.ones_like(ids)
        if shape.padded:
            spread = torch.randn(shape.rows, 1, generator=generator)
            lengths = (shape.tokens / 3 * torch.exp(0.45 * spread)).clamp(4, shape.tokens)
            mask = (torch.arange(int(lengths.max())) < lengths).long()
            ids = ids[:, : mask.shape[1]] * mask
            labels = labels if shape.classes else ids.masked_fill(mask == 0, -100)
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


def steps(model: nn.Module, kinds: tuple[str, ...]) -> dict[str, Callable[[Any], Any]]:
    """What runs forward and backward for each kind of step; nothing is made for other kinds."""
    made: dict[str, Callable[[Any], Any]] = {}
    if "plain" in kinds:
        made["plain"] = lambda batch: model(**batch).loss.backward()
    if "protected" in kinds:
        made["protected"] = Protector(model, Trap2Config(warmup=0, ramp=0)).backward
    if "one_pass" in kinds:
        riding = Trap2Config(warmup=0, ramp=0, one_pass=True)
        made["one_pass"] = Protector(model, riding).backward
    if "from_files" in kinds:
        made["from_files"] = _from_files(model)
    if "all_rows" in kinds:
        every = Trap2Config.preset("all_rows", warmup=0, ramp=0)
        made["all_rows"] = Protector(model, every).backward
    if "paper" in kinds:
        made["paper"] = Protector(model, Trap2Config.preset("paper")).backward
    if "two_pass" in kinds:
        made["two_pass"] = TwoPass(model)
    return {kind: made[kind] for kind in kinds}


def _from_files(model: nn.Module) -> Callable[[Any], Any]:
    folder = tempfile.TemporaryDirectory()
    start = {name: p.detach() for name, p in model.named_parameters()}
    save_file(start, Path(folder.name) / "model.safetensors")
    reading = Trap2Config(warmup=0, ramp=0, base_files=folder.name)
    protector = Protector(model, reading)

    def run(batch: Any) -> None:
        assert folder  # it stays as long as the step does
        protector.backward(batch)

    return run


class TwoPass:
    """L(W0 + dW) - strength / s * L(W0 + s * dW), with a second set of weights for the second."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.shared = LiveUpdate(model).shared
        self.config = Trap2Config.preset("paper")
        self.calls = 0

    def __call__(self, batch: dict[str, Tensor]) -> None:
        """Forward and backward of both passes; the gradients are left in `.grad`."""
        self.model(**batch).loss.backward()
        law = self.config.law_at(self.calls)
        (s,) = law.draw(0, self.calls)
        self.calls += 1
        scaled = {
            item.name: item.parameter * s
            if item.origin is None
            else item.origin() + s * (item.parameter - item.origin())
            for item in self.shared
        }
        loss = functional_call(self.model, scaled, (), batch).loss
        (-self.config.strength * law.weight(s) * loss).backward()


def kinds_of(method: str) -> tuple[str, ...]:
    """The kinds of step that a way of training has."""
    return tuple(kind for kind in STEPS if ONLY.get(kind, method) == method)


def seconds(
    model: nn.Module, shape: Shape, device: str, repeats: int, kinds: tuple[str, ...]
) -> dict[str, list[float]]:
    """Seconds of a step of every kind, alternating on the same batches."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    taken: dict[str, list[float]] = {kind: [] for kind in kinds}
    runs = steps(model, kinds)
    drawn = batches(shape, repeats + 1, device)
    for number in range(repeats + 1):
        for kind, run in runs.items():
            start = time.perf_counter()
            _one(model, optimizer, run, drawn[number])
            if device == "cuda":
                torch.cuda.synchronize()
            if number > 0:  # the first ones warm up caches
                taken[kind].append(time.perf_counter() - start)
    return taken


def _one(
    model: nn.Module, optimizer: torch.optim.Optimizer, run: Callable[[Any], Any], batch: Any
) -> None:
    run(batch)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def peak(name: str, method: str, kind: str, device: str) -> int:
    """Peak bytes of three steps of one kind, in this process, above what it holds now."""
    shape = SHAPES[name]
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
        before = _resident("VmRSS")
    model = build(shape, method, device)
    run = steps(model, (kind,))[kind]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    for batch in batches(shape, 3, device):
        _one(model, optimizer, run, batch)
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated()) - before
    return _resident("VmHWM") - before


def _resident(what: str) -> int:
    """Bytes of this process in memory, now (VmRSS) or at most (VmHWM). Linux."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {what}")


def _peak_apart(name: str, method: str, kind: str, device: str) -> int:
    """The same apart from other kinds: on the CPU in a process of its own."""
    if device == "cuda":
        return peak(name, method, kind, device)
    command = [sys.executable, __file__, "--peak", name, method, kind, "--device", device]
    given_back = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # bytes; glibc's own grows to 32 MiB
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, **given_back}
    )
    return int(json.loads(done.stdout.splitlines()[-1]))


def measure(name: str, method: str, device: str, repeats: int) -> dict[str, Any]:
    """Time and memory of one model and one way of training it."""
    shape, kinds = SHAPES[name], kinds_of(method)
    taken = seconds(build(shape, method, device), shape, device, repeats, kinds)
    memory = {kind: _peak_apart(name, method, kind, device) for kind in kinds}
    return {
        "rows": shape.rows,
        "tokens": shape.tokens,
        "repeats": repeats,
        "seconds": {kind: statistics.median(values) for kind, values in taken.items()},
        "time_ratio": {kind: _ratio(taken[kind], taken["plain"]) for kind in kinds},
        "peak_bytes": memory,
        "memory_ratio": {kind: memory[kind] / memory["plain"] for kind in kinds},
    }


def _ratio(values: list[float], plain: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(values, plain, strict=True))


def figures(runs: dict[str, Any]) -> dict[str, float]:
    """The worst over the models measured on whole rows; padded ones, batch norm and GPUs apart."""
    found: dict[str, float] = {}
    for what, kind, prefix in (
        ("time_ratio", "protected", "time_ratio"),
        ("memory_ratio", "protected", "memory_ratio"),
        ("time_ratio", "one_pass", "one_pass_time_ratio"),
        ("memory_ratio", "one_pass", "one_pass_memory_ratio"),
        ("time_ratio", "from_files", "from_files_time_ratio"),
        ("memory_ratio", "from_files", "from_files_memory_ratio"),
        ("time_ratio", "all_rows", "all_rows_time_ratio"),
        ("memory_ratio", "all_rows", "all_rows_memory_ratio"),
        ("time_ratio", "paper", "paper_time_ratio"),
        ("time_ratio", "two_pass", "two_pass_time_ratio"),
        ("memory_ratio", "two_pass", "two_pass_memory_ratio"),
    ):
        for key, run in runs.items():
            device, name, method = key.split("/")
            suffix = "_padded" * SHAPES[name].padded + "_batch_norm" * bool(SHAPES[name].pixels)
            suffix += "_gpu" * (device == "cuda")
            if kind in run[what]:
                figure = f"{prefix}_{method}{suffix}"
                found[figure] = max(found.get(figure, 0.0), run[what][kind])
    return found


def main() -> None:
    """Measure what was asked for and add it to the results."""
    top = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    top.add_argument("--models", nargs="+", default=DEFAULT, choices=SHAPES)
    top.add_argument("--methods", nargs="+", default=["lora", "full"], choices=["lora", "full"])
    top.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    top.add_argument("--repeats", type=int, default=15)
    top.add_argument("--out", type=Path, default=OUT)
    top.add_argument("--peak", nargs=3, metavar=("MODEL", "METHOD", "STEP"), help=argparse.SUPPRESS)
    chosen = top.parse_args()
    if chosen.peak:
        print(json.dumps(peak(*chosen.peak, chosen.device)))
        return
    runs = read_json(chosen.out)["runs"] if chosen.out.is_file() else {}
    for name in chosen.models:
        for method in chosen.methods:
            if SHAPES[name].pixels and method == "lora":
                continue  # an adapter is trained with the base's statistics
            command = shlex.join(["python", "benchmarks/step_cost.py", *sys.argv[1:]])
            measured = measure(name, method, chosen.device, chosen.repeats)
            made = {"command": command, "machine": machine(), "versions": versions()}
            runs[f"{chosen.device}/{name}/{method}"] = {**made, **measured}
            record = {
                "figures": figures(runs),
                "command": "python benchmarks/step_cost.py",
                "seeds": [0],
                "setting": asdict(Trap2Config()),
                "runs": runs,
            }
            write_json(chosen.out, record)


if __name__ == "__main__":
    main()
