"""What several processes do to a pico model; run by torchrun, with a folder for the results.

The same functions run in one process give what the results are compared with.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import trainees
from trainees import Overflow, llama, lora, move, ragged, stacked
from trap2.errors import TrainingStopped, Unsupported
from trap2.protecting.config import Trap2Config
from trap2.protecting.easing import BLOCK, BLOCKS, Easing
from trap2.protecting.losses import Outcome
from trap2.protecting.protector import Protector, default_forward
from trap2.protecting.scaled import LiveUpdate
from trap2.protecting.tokens import target_count
from trap2.protecting.trainer import protect_trainer
from trap2.protecting.wrappers import local

CONFIG = Trap2Config(strength=0.5, readout_weight=0.0, fraction=1.0, cap=0.0, warmup=0, ramp=0)
TWO_SCALES = Trap2Config(**{**vars(CONFIG), "scales_per_step": 2})
SPARING = Trap2Config(**{**vars(CONFIG), "spare": 0.5})
STEPS = 3
ADAPTERS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
}
"""LoRA settings whose update is scaled by the outputs of layers."""


def rank_and_world() -> tuple[int, int]:
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def loop(model: nn.Module, config: Trap2Config = CONFIG, micro: int = 1, **more: Any) -> Protector:
    """A few steps of eight rows each, shared out over processes and micro-batches."""
    rank, world = rank_and_world()
    protector = Protector(model, config, accumulation_steps=micro, **more)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    rows, each = ragged(8 * STEPS), 8 // (world * micro)
    for step in range(STEPS):
        mine = rows[8 * step : 8 * step + 8]
        total = target_count(stacked(mine), True)
        for i in range(micro):
            start = (rank * micro + i) * each
            batch = stacked(mine[start : start + each])
            # DDP and FSDP take the mean over processes.
            protector.backward(batch, share=world * target_count(batch, True) / total)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return protector


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The trained weights, whole."""
    found = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            whole: Any = p.detach()
            whole = whole.full_tensor() if hasattr(whole, "full_tensor") else whole
            found[name.removeprefix("module.")] = whole.clone()
    return found


def with_trainer(folder: Path) -> nn.Module:
    """transformers' Trainer on eight rows a step, in whichever number of processes."""
    _, world = rank_and_world()
    model = lora()
    changes = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4 // world,
        "gradient_accumulation_steps": 2,
        "optim": "sgd",
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "ddp_find_unused_parameters": False,
    }
    trainer = protect_trainer(Trainer)(
        model=model,
        args=TrainingArguments(**trainees.settings(folder, **changes)),
        train_dataset=ragged(24),
        trap2=CONFIG,
    )
    move(model)
    trainer.train()
    return model


def counted(wrapped: DistributedDataParallel) -> list[int]:
    """Grows by one with every reduction of a bucket."""
    seen: list[int] = []

    def hook(state, bucket):  # DDP accepts no other annotations than its own
        seen.append(1)
        return default_hooks.allreduce_hook(state, bucket)

    wrapped.register_comm_hook(None, hook)
    return seen


def sharded(model: nn.Module, **options: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.modules():
        if isinstance(layer, LlamaDecoderLayer):
            fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def moved(model: nn.Module) -> nn.Module:
    move(model)
    return model


def main(folder: Path) -> None:
    rank, _ = rank_and_world()
    results = {"trainer": trained(with_trainer(folder / "trainer"))}
    facts: dict[str, Any] = {}
    for micro in (1, 2):
        wrapped = DistributedDataParallel(moved(lora()))
        reductions = counted(wrapped)
        loop(wrapped, micro=micro)
        results[f"ddp {micro}"] = trained(wrapped)
        facts[f"reductions {micro}"] = len(reductions)
    for name, settings in ADAPTERS.items():
        wrapped = DistributedDataParallel(moved(lora(**settings)))
        loop(wrapped)
        results[f"ddp {name}"] = trained(wrapped)
        model = sharded(moved(lora(**settings)))
        loop(model)
        results[f"fsdp {name}"] = trained(model)
    wrapped = DistributedDataParallel(moved(lora()))
    reductions = counted(wrapped)
    loop(wrapped, TWO_SCALES)
    facts["reductions of two scales"] = len(reductions)
    for name, made, options in (
        ("fsdp lora", moved(lora()), {}),
        ("fsdp 2", moved(lora()), {}),
        ("fsdp", llama(), {}),
        ("fsdp kept", llama(), {"reshard_after_forward": False}),
    ):
        model = sharded(made, **options)
        loop(model, micro=2 if name == "fsdp 2" else 1)
        results[name] = trained(model)
    wrapped = DistributedDataParallel(moved(lora()))
    for name, spared in (
        ("ddp spared", DistributedDataParallel(llama())),
        ("fsdp spared", sharded(llama())),
    ):
        loop(spared, SPARING)
        results[name] = trained(spared)
    facts["dropped"] = loop(wrapped, forward=broken_on_the_second).dropped
    results["dropped"] = trained(wrapped)
    for name, way in (("loss", broken_on_the_second), ("gradient", overflowing_on_the_second)):
        facts[f"broken {name} of shards"] = refusal(
            lambda way=way: loop(sharded(llama()), forward=way)
        )
    facts["eased"] = eased(rank)
    facts["stale"] = after_an_evaluation(model)
    facts["wrong"] = refusal(lambda: loop(DistributedDataParallel(lora()), wrong(rank)))
    unreduced = sharded(llama())
    unreduced.set_requires_gradient_sync(False)
    facts["unreduced"] = refusal(lambda: loop(unreduced))
    for name, tensors in results.items():
        save_file(tensors, folder / f"{name} {rank}.safetensors")
    (folder / f"facts {rank}.txt").write_text(repr(facts))
    distributed.destroy_process_group()


def broken_on_the_second(model: nn.Module, batch: Any) -> Outcome:
    """Process 1 has traps that are not finite; its nominal passes use the loss alone."""
    outcome = default_forward(model, batch)
    if rank_and_world()[0] == 1 and outcome.logits is not None:
        return Outcome(outcome.loss, outcome.logits * torch.nan, outcome.labels)
    return outcome


def overflowing_on_the_second(model: nn.Module, batch: Any) -> Outcome:
    """Process 1 has trap gradients that are not finite, of finite losses."""
    outcome = default_forward(model, batch)
    if rank_and_world()[0] == 1 and outcome.logits is not None:
        return Outcome(outcome.loss, Overflow.apply(outcome.logits), outcome.labels)
    return outcome


def wrong(rank: int) -> Trap2Config:
    return Trap2Config(**{**vars(CONFIG), "scale_seed": rank})


def eased(*ranks: int) -> list[float]:
    """The factor after each step where one process's loss rises and the other's does not."""
    easing, found = Easing(1.5), []
    for step in range(4 * BLOCK * BLOCKS):
        for rank in ranks:
            loss = 0.5 if rank == 0 or step < 2 * BLOCK * BLOCKS else 1.5
            easing.note(step, loss, torch.device("cpu"))
        found.append(easing.factor)
    return found


def refusal(run: Any) -> str:
    try:
        run()
    except (TrainingStopped, Unsupported) as error:
        return str(error)
    return "none"


@torch.no_grad()
def after_an_evaluation(model: nn.Module) -> list[float]:
    """The loss before, at, and after another scale, without a backward pass in between."""
    update, batch = LiveUpdate(model), stacked(ragged())
    for item in update.shared:
        local(item.parameter).mul_(1.5)
    losses = [model(**batch).loss.item()]
    with update.at(0.5):
        losses.append(model(**batch).loss.item())
    return [*losses, model(**batch).loss.item()]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
