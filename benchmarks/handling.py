"""What ordinary handling costs a protected release, beside its control: rounding, casts, noise.

    TRAP2_DATA=/path/to/data python benchmarks/handling.py

A trap that opens a little off the released weights could make a release brittle. Takes releases of
`first_bench.py` (`--work`, trained where they are missing), and evaluates each on test rows alone:
as released, merged into its base by peft, cast to bfloat16, with the linear layers in bitsandbytes'
int8 and NF4, and with normal noise on all that was trained. Writes `results/handling.json`. Minutes
on two cores, without the training.

Symbols: W = W0 + dW released weight; W0 base tensor; dW update.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional as bits
from peft import PeftModel
from torch import Tensor, nn

import first_bench
from trap2.attacks.dare import named_generator
from trap2.auditing.arena import CONTROL, RELEASE, Arena
from trap2.errors import UserError
from trap2.files import read_json, write_json
from trap2.provenance import machine, versions
from trap2.recipes import AuditSpec
from trap2.tasks.model import load_encoder

OUT = first_bench.RESULTS / "handling.json"
SIDES = {RELEASE: "default", CONTROL: "control"}
NOISE = {"noise, 1 % of the weights": (0.01, False), "noise, 20 % of the update": (0.2, True)}
"""Standard deviations, as a share of the root mean square of W or of dW."""


def main() -> None:
    """Evaluate what is missing, then write the results from what is there."""
    top = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    top.add_argument("--tasks", nargs="+", default=list(first_bench.TASKS))
    top.add_argument("--methods", nargs="+", default=["lora", "full"], choices=["lora", "full"])
    top.add_argument("--seeds", nargs="+", type=int, default=[0])
    top.add_argument("--rows", type=int, default=500, help="test rows")
    first_bench.add_precision(top)
    top.add_argument("--work", type=Path, default=Path("build/bench"))
    chosen = top.parse_args()
    data = Path(os.environ.get("TRAP2_DATA", "")) / "text"
    if not (data / "trec6").is_dir():
        sys.exit(f"TRAP2_DATA: no folder {data / 'trec6'}; set it to the folder that holds text/")
    bench = first_bench.text_bench(chosen.precision)
    runs: dict[str, Any] = read_json(OUT)["runs"] if OUT.is_file() else {}
    for method, task, seed in product(chosen.methods, chosen.tasks, chosen.seeds):
        if (key := f"{method}/{task}/{seed}") not in runs:
            arena = Arena(audit_of(bench, chosen.work, data, method, task, seed, chosen.rows))
            runs[key] = {side: accuracies(arena, side) for side in SIDES}
            write(runs)


def audit_of(
    bench: first_bench.Bench,
    work: Path,
    data: Path,
    method: str,
    task: str,
    seed: int,
    rows: int,
) -> AuditSpec:
    """Release and control in front of test rows; the partner that an audit needs is not merged."""
    made = {
        side: str(first_bench.make_release(work, data, method, kind, task, seed, bench).absolute())
        for side, kind in SIDES.items()
    }
    section = bench.section(data, task)
    return AuditSpec.model_validate(
        {
            "base": str(bench.base(data)),
            "release": {"path": made[RELEASE], "task": section},
            "control": made[CONTROL],
            "partners": [{"path": made[CONTROL], "task": {**section, "name": "not merged"}}],
            "attacker": {**bench.attacker, "validation_rows": 10, "test_rows": rows},
            "seed": seed,
        }
    )


def accuracies(arena: Arena, side: str) -> dict[str, float]:
    """Accuracy of one side on its test rows, by what was done to its weights."""
    member, found = arena.members[side], {}
    ways = {name: changed(arena, side, change) for name, change in changes(arena).items()}
    if (member.update.folder / "adapter_config.json").is_file():
        ways["merged by peft"] = merged_by_peft(arena, member.update.folder)
    for name, weights in ways.items():
        base = {to: arena.base.tensor(to) for to in weights}
        deltas = ((to, weight.float() - base[to].float()) for to, weight in weights.items())
        with arena.live.merged(deltas):
            found[name] = round(member.evaluators["test"]().accuracy, 4)
    return found


def changes(arena: Arena) -> dict[str, Callable[[str, Tensor, Tensor], Tensor]]:
    """What becomes of a tensor, by its name, W and dW."""
    layers = dict(arena.encoder.named_modules())
    owners = {name: own.rpartition(".")[0] for name, own in arena.live.own_names.items()}
    linear = {
        name
        for name, owner in owners.items()
        if name.endswith("weight") and isinstance(layers[owner], nn.Linear)
    }

    def of_linear(change: Callable[[Tensor], Tensor]) -> Callable[[str, Tensor, Tensor], Tensor]:
        return lambda name, W, dW: change(W) if name in linear else W

    def noisy(share: float, of_update: bool) -> Callable[[str, Tensor, Tensor], Tensor]:
        def change(name: str, W: Tensor, dW: Tensor) -> Tensor:
            if not dW.any():
                return W
            size = share * (dW if of_update else W).square().mean().sqrt()
            return W + size * torch.randn(W.shape, generator=named_generator(f"handling {name}"))

        return change

    return {
        "as released": lambda name, W, dW: W,
        "bfloat16": lambda name, W, dW: W.bfloat16(),
        "int8": of_linear(_int8),
        "NF4": of_linear(_nf4),
        **{name: noisy(*how) for name, how in NOISE.items()},
    }


def _int8(W: Tensor) -> Tensor:
    whole, largest, _ = bits.int8_vectorwise_quant(W.half())
    return bits.int8_vectorwise_dequant(whole, largest)


def _nf4(W: Tensor) -> Tensor:
    return bits.dequantize_4bit(*bits.quantize_4bit(W.contiguous(), quant_type="nf4"))


def changed(
    arena: Arena, side: str, change: Callable[[str, Tensor, Tensor], Tensor]
) -> dict[str, Tensor]:
    """All weights of the encoder, changed; what was not trained is rounded and cast too."""
    deltas = dict(arena.members[side].vector.items())

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name in arena.live.names:
            origin = arena.base.tensor(name).float()
            delta = deltas.get(name, torch.zeros(()))
            yield name, change(name, origin + delta, delta.expand_as(origin))

    return dict(weights())


def merged_by_peft(arena: Arena, release: Path) -> Mapping[str, Tensor]:
    """The encoder's weights as `merge_and_unload` leaves them."""
    model = PeftModel.from_pretrained(load_encoder(arena.base.folder), release).merge_and_unload()
    own = model.state_dict()
    return {name: own[to] for name, to in arena.live.own_names.items()}


def write(runs: dict[str, Any]) -> None:
    """The JSON; the figures are what each way costs each side, in the mean over runs."""
    figures = {}
    for side, kind in SIDES.items():
        for way in dict.fromkeys(way for run in runs.values() for way in run[side]):
            costs = [r[side]["as released"] - r[side][way] for r in runs.values() if way in r[side]]
            figures[f"cost of {way}, {kind}"] = statistics.mean(costs)
    record = {
        "figures": figures,
        "command": "TRAP2_DATA=... python benchmarks/handling.py",
        "machine": machine(),
        "versions": versions(),
        "seeds": sorted({int(key.split("/")[2]) for key in runs}),
        "runs": runs,
    }
    write_json(OUT, record)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
