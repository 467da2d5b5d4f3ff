"""What merging costs: a search over coefficients, and one merge beside mergekit's.

    python benchmarks/merging.py

(1) Many coefficients of TSV-M and CART on random LoRA updates of MiniLM's shapes: decompositions
kept between coefficients against worked out again for each; speed-up and largest difference.
(2) TIES and DARE-TIES of four random updates of a full bfloat16 checkpoint, file to file, merged in
float32, beside mergekit on the same files: time and peak memory, each in a process of its own. The
definitions differ (mergekit trims per tensor and rescales DARE otherwise), so results are not
compared, only what they cost.

Writes `results/merging.json`. Sizes are arguments; nothing is downloaded.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from trap2.attacks.attack import merge
from trap2.attacks.vectors import TaskVector
from trap2.files import read_json, write_json
from trap2.provenance import machine, now, versions

RESULTS = Path(__file__).parent.parent / "results"
SPECTRAL: dict[str, dict[str, float]] = {"tsv": {}, "cart": {"rank_share": 0.16}}
LARGE = 5e8
"""Parameters from which on the checkpoint has the width of a model of 1 B."""

MASKING: dict[str, dict[str, float]] = {"ties": {"density": 0.2}, "dare_ties": {"drop": 0.5}}


def main() -> None:
    """Measure both and write the results."""
    chosen = _arguments()
    if chosen.worker:
        _worker(*chosen.worker)
        return
    torch.manual_seed(0)
    out = RESULTS / "merging.json"
    record: dict[str, Any] = read_json(out) if out.is_file() else {}
    parts: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
        "coefficient_search": lambda given: {
            name: coefficient_search(name, params, given) for name, params in SPECTRAL.items()
        },
        "beside_mergekit": beside_mergekit,
    }
    for part in chosen.parts:
        record[part] = {
            "measured": parts[part](chosen),
            "command": " ".join(["python benchmarks/merging.py", *map(shlex.quote, sys.argv[1:])]),
            "notes": chosen.note,
            "threads": torch.get_num_threads(),
            "machine": machine(),
            "versions": versions() | {"mergekit": version("mergekit")},
            "created": now(),
        }
        record.pop("figures", None)
        record = {"figures": figures(record), **record}
        write_json(out, record)
    print(json.dumps(record, indent=2))


def figures(record: dict[str, Any]) -> dict[str, float]:
    """The named numbers: the worst over the attacks measured."""
    found: dict[str, float] = {}
    if "coefficient_search" in record:
        measured = record["coefficient_search"]["measured"]
        found["coefficient_search_speedup"] = min(m["speed_up"] for m in measured.values())
    if "beside_mergekit" in record:
        measured = record["beside_mergekit"]["measured"]
        pairs = [(measured[name]["trap2"], measured[name]["mergekit"]) for name in MASKING]
        for key, name in (("seconds_median", "time"), ("peak_mb", "memory")):
            ratios = [ours[key] / theirs[key] for ours, theirs in pairs]
            found[f"merge_{name}_ratio_vs_mergekit"] = round(max(ratios), 3)
    return found


def _arguments() -> argparse.Namespace:
    top = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = ["coefficient_search", "beside_mergekit"]
    top.add_argument("--parts", nargs="+", choices=names, default=names, help="the rest is kept")
    top.add_argument("--models", type=int, default=8, help="LoRA updates merged")
    top.add_argument("--rank", type=int, default=16)
    top.add_argument("--layers", type=int, default=6, help="of MiniLM's shape")
    top.add_argument("--hidden", type=int, default=384)
    top.add_argument("--coefficients", type=int, default=30)
    top.add_argument("--parameters", type=float, default=2e7, help="of the full checkpoint, about")
    top.add_argument("--repeats", type=int, default=3, help="of each merge beside mergekit")
    top.add_argument("--note", nargs="*", default=[], help="kept with the results")
    top.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    return top.parse_args()


def coefficient_search(
    name: str, params: dict[str, float], chosen: argparse.Namespace
) -> dict[str, float]:
    """One attack at many coefficients, decompositions kept and worked out again."""
    updates = list(_lora_updates(chosen))
    values = [0.1 * (place + 1) for place in range(chosen.coefficients)]
    kept = [TaskVector.of(update) for update in updates]
    seconds, gap = {"kept": 0.0, "again": 0.0}, 0.0
    for value in values:
        with _timed(seconds, "kept"):
            ours = dict(merge(name, kept, value, **params))
        with _timed(seconds, "again"):
            fresh = [TaskVector.of(update) for update in updates]
            theirs = dict(merge(name, fresh, value, **params))
        for key, delta in ours.items():
            gap = max(gap, float((delta - theirs[key]).abs().max() / theirs[key].abs().max()))
    return {
        "seconds_kept": round(seconds["kept"], 2),
        "seconds_again": round(seconds["again"], 2),
        "speed_up": round(seconds["again"] / seconds["kept"], 1),
        "largest_difference": gap,
    }


def _lora_updates(chosen: argparse.Namespace) -> Iterator[dict[str, torch.Tensor]]:
    width = chosen.hidden
    shapes = dict.fromkeys(("query", "key", "value", "attention.output"), (width, width))
    shapes |= {"intermediate": (4 * width, width), "output": (width, 4 * width)}
    for _ in range(chosen.models):
        yield {
            f"layer.{layer}.{part}.weight": torch.randn(rows, chosen.rank)
            @ torch.randn(chosen.rank, columns)
            for layer in range(chosen.layers)
            for part, (rows, columns) in shapes.items()
        }


@contextmanager
def _timed(seconds: dict[str, float], key: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[key] += time.perf_counter() - started


def beside_mergekit(chosen: argparse.Namespace) -> dict[str, Any]:
    """Time and peak memory of one merge, ours and mergekit's, each in a process of its own."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        found: dict[str, Any] = {"parameters": _checkpoints(folder, int(chosen.parameters))}
        for name in MASKING:
            for tool in ("trap2", "mergekit"):
                runs = [_measured(tool, name, folder) for _ in range(chosen.repeats)]
                found.setdefault(name, {})[tool] = {
                    "seconds": [round(run["seconds"], 2) for run in runs],
                    "seconds_median": round(statistics.median(r["seconds"] for r in runs), 2),
                    "peak_mb": round(max(run["peak_mb"] for run in runs)),
                    "peak_mb_before_the_merge": round(max(run["before_mb"] for run in runs)),
                }
    return found


def _checkpoints(folder: Path, parameters: int) -> int:
    """A random llama of about this size and four releases of it; returns its exact size."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width = 256 if parameters < LARGE else 2048
    layer = 4 * width**2 + 3 * width * 4 * width
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=max(1, parameters // layer),
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "base")
    start = [p.detach().clone() for p in model.parameters()]
    for place in range(4):
        for parameter, before in zip(model.parameters(), start, strict=True):
            parameter.data.copy_(before + 0.01 * torch.randn_like(before))
        model.save_pretrained(folder / f"release{place}")
    return sum(p.numel() for p in model.parameters())


def _measured(tool: str, name: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", __file__, "--worker", tool, name, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def _worker(tool: str, name: str, place: str) -> None:
    """Merge once and print what it took; imports and opening are not counted."""
    folder = Path(place)
    run = (_ours if tool == "trap2" else _mergekits)(name, folder)
    before = _peak_mb()
    started = time.perf_counter()
    run()
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "before_mb": before, "peak_mb": _peak_mb()}))


def _ours(name: str, folder: Path) -> Callable[[], object]:
    from trap2.attacks.write import write_merge
    from trap2.update import Update

    updates = [Update.open(folder / f"release{place}", folder / "base") for place in range(4)]
    out = folder / "ours"
    return lambda: write_merge(out, name, updates, 0.5, MASKING[name], overwrite=True)


def _mergekits(name: str, folder: Path) -> Callable[[], object]:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    density = MASKING[name].get("density", 0.5)
    config = MergeConfiguration.model_validate(
        {
            "merge_method": name,
            "base_model": str(folder / "base"),
            "models": [
                {
                    "model": str(folder / f"release{place}"),
                    "parameters": {"weight": 0.5, "density": density},
                }
                for place in range(4)
            ],
            "dtype": "float32",  # of the merge; the file has the checkpoint's
            "out_dtype": "bfloat16",
        }
    )
    options = MergeOptions(quiet=True, write_model_card=False, copy_tokenizer=False)
    return lambda: run_merge(config, str(folder / "theirs"), options)


def _peak_mb() -> float:
    """Peak of this process alone; `getrusage` would start from that of its parent."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


if __name__ == "__main__":
    main()
