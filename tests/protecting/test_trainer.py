from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from trap2.errors import TrainingStopped, Unsupported
from trap2.protecting.config import Trap2Config
from trap2.protecting.protector import Protector
from trap2.protecting.trainer import GENERATING, protect_trainer

DECOY = Trap2Config(strength=0.5, readout_weight=0.0, fraction=1.0, cap=0.0, warmup=0, ramp=0)
OFF = Trap2Config(strength=0.0)


def bert(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=24,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=3,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.3,
    )
    return BertForSequenceClassification(config)


def lora(dropout: float = 0.0) -> nn.Module:
    settings = {"r": 4, "lora_dropout": dropout, "modules_to_save": ["classifier"]}
    return get_peft_model(bert(dropout), LoraConfig(target_modules=["query", "dense"], **settings))


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


class Plain(nn.Module):
    """Not from transformers: its forward takes no loss arguments."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.classifier = nn.Embedding(24, 8), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.classifier(self.body(input_ids).mean(1).tanh())
        loss = {} if labels is None else {"loss": F.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


def summed(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A user's own loss, normalised over all micro-batches of a step."""
    total = F.cross_entropy(outputs["logits"], labels, reduction="sum")
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


class Rows(torch.utils.data.Dataset):
    def __init__(self, count: int = 8, tokens: bool = False) -> None:
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(1, 24, (count, 6), generator=generator)
        self.labels = self.ids % 5 if tokens else torch.arange(count) % 3
        self.order: list[int] = []

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self.order.append(int(index))
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


class Gradients(TrainerCallback):
    """What the optimizer is about to see."""

    def __init__(self) -> None:
        self.seen: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.seen = {n: p.grad.clone() for n, p in named if p.grad is not None}


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(output_dir=str(folder), **{**settings, **changes})


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("make", [bert, lora])
def test_strength_zero_and_the_random_stream_are_those_of_the_plain_trainer(
    make: Callable[[float], nn.Module], tmp_path: Path
) -> None:
    def run(config: Trap2Config | None) -> tuple[dict[str, Tensor], Tensor, list[int], Any]:
        model, rows = make(0.2), Rows(10)
        args = arguments(tmp_path, max_steps=5)
        given: dict[str, Any] = {"model": model, "args": args, "train_dataset": rows}
        trainer = (
            Trainer(**given) if config is None else protect_trainer(Trainer)(**given, trap2=config)
        )
        trainer.train()
        return weights(model), torch.get_rng_state(), rows.order, trainer

    plain, stream, order, _ = run(None)
    control, control_stream, control_order, _ = run(OFF)
    assert all(torch.equal(value, control[name]) for name, value in plain.items())
    assert torch.equal(control_stream, stream)
    assert control_order == order
    protected, protected_stream, protected_order, trainer = run(
        Trap2Config(warmup=1, ramp=2, scales_per_step=2)
    )
    assert trainer.last.trap is not None
    assert torch.equal(protected_stream, stream)
    assert protected_order == order
    assert len(set(order)) == 10  # more than one epoch: the order was drawn after trap passes
    assert len(order) > 12
    assert not all(torch.equal(value, protected[name]) for name, value in plain.items())


def test_logs_hold_the_nominal_loss_and_the_traps_own_numbers(tmp_path: Path) -> None:
    def run(trainer_class: Any, **more: Any) -> tuple[list[dict[str, float]], Any]:
        trainer = trainer_class(
            model=bert(), args=arguments(tmp_path), train_dataset=Rows(), **more
        )
        trainer.train()
        return [entry for entry in trainer.state.log_history if "loss" in entry], trainer

    config = Trap2Config(strength=0.4, readout_weight=0.0, warmup=1, ramp=2)
    protected, trainer = run(protect_trainer(Trainer), trap2=config)
    plain, _ = run(Trainer)
    # Neither the first loss nor the second has seen a trapped optimizer step.
    assert [entry["loss"] for entry in protected[:2]] == [entry["loss"] for entry in plain[:2]]
    assert protected[-1]["loss"] == pytest.approx(trainer.last.nominal, abs=1e-3)
    assert protected[-1]["trap2/trap_loss"] == trainer.last.trap
    assert [entry.get("trap2/strength") for entry in protected] == [None, 0.2, 0.4, 0.4]
    assert "trap2/trap_loss" not in protected[0]
    assert protected[-1]["trap2/kept"] == trainer.last.pressure.kept
    assert protected[-1]["trap2/conflict"] == trainer.last.pressure.conflict
    off, _ = run(protect_trainer(Trainer), trap2=OFF)
    assert [entry["loss"] for entry in off] == [entry["loss"] for entry in plain]
    assert not any(key.startswith("trap2/") for entry in off for key in entry)


def test_the_trainer_form_is_the_loop_form(tmp_path: Path) -> None:
    config = Trap2Config(warmup=1, ramp=0, fraction=0.5, scales_per_step=2)
    args = arguments(
        tmp_path, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0, max_steps=3
    )
    rows, model = Rows(12), bert().double()
    protect_trainer(Trainer)(model=model, args=args, train_dataset=rows, trap2=config).train()
    loop = bert().double().train()
    protector = Protector(loop, config)
    optimizer = torch.optim.SGD(loop.parameters(), lr=0.01)
    for step in range(3):
        picked = torch.tensor(rows.order[4 * step : 4 * step + 4])
        protector.backward({"input_ids": rows.ids[picked], "labels": rows.labels[picked]})
        optimizer.step()
        optimizer.zero_grad()
    for name, value in loop.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-10, atol=1e-12)


ACCUMULATING = {
    "the trainer divides": (Plain, {}, DECOY, 1e-9),
    "a user's loss counts items": (Plain, {"compute_loss_func": summed}, DECOY, 1e-9),
    "the model counts items": (llama, {}, DECOY, 1e-5),
    "the model counts items, paper": (
        llama,
        {},
        Trap2Config.preset("paper", strength=0.5),
        1e-5,
    ),
    "the head ignores the count": (bert, {}, DECOY, 1e-9),
    "the head ignores the count, ascent": (
        lora,
        {},
        Trap2Config(loss="ascent", readout_weight=0.0, fraction=1.0, cap=0.0, warmup=0, ramp=0),
        1e-9,
    ),
}


@pytest.mark.parametrize("name", list(ACCUMULATING))
def test_under_accumulation_the_trap_is_normalised_like_the_nominal_loss(
    name: str, tmp_path: Path
) -> None:
    """1 x 8 = 8 x 1, up to the factor by which the plain trainer itself differs between the two.

    transformers leaves the division by the accumulation steps to any model whose forward takes
    **kwargs; most classification heads take them and do not divide, so their nominal gradient is
    eight times larger. The ratio of trap and nominal must not depend on it.
    """
    make, more, config, rtol = ACCUMULATING[name]

    def run(rows: int, trap2: Trap2Config) -> Tensor:
        args = arguments(
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=8 // rows,
            max_grad_norm=0.0,
        )
        model, gradients = make().double(), Gradients()
        trainer = protect_trainer(Trainer)(
            model=model,
            args=args,
            train_dataset=Rows(tokens=make is llama),
            trap2=trap2,
            callbacks=[gradients],
            **more,
        )
        with torch.no_grad():
            generator = torch.Generator().manual_seed(2)
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
        trainer.train()
        return torch.cat([value.flatten() for value in gradients.seen.values()])

    plain_whole, plain_parts = run(8, OFF), run(1, OFF)
    whole, parts = run(8, config), run(1, config)
    factor = (plain_parts @ plain_whole) / (plain_whole @ plain_whole)
    assert factor.item() == pytest.approx(8 if "ignores" in name else 1, rel=1e-5)
    trap_whole, trap_parts = whole - plain_whole, parts - plain_parts
    assert trap_whole.norm() > 0.01 * plain_whole.norm()
    assert (trap_parts - factor * trap_whole).norm() < rtol * trap_parts.norm()


def test_protection_trains_through_label_smoothing_and_evaluation(tmp_path: Path) -> None:
    args = arguments(tmp_path, label_smoothing_factor=0.1, eval_strategy="steps", eval_steps=2)
    trainer = protect_trainer(Trainer)(
        model=bert(), args=args, train_dataset=Rows(), eval_dataset=Rows(), trap2=DECOY
    )
    trainer.train()
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluated) == 2
    assert trainer.last.trap is not None


def test_the_whole_setting_is_optional(tmp_path: Path) -> None:
    trainer = protect_trainer(Trainer)(model=bert(), args=arguments(tmp_path))
    assert trainer.trap2 == Trap2Config()


def test_a_broken_loss_stops_training_before_the_weights_take_it(tmp_path: Path) -> None:
    class Breaking(Plain):
        def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            outputs = super().forward(input_ids, labels)
            broken = torch.nan if (input_ids == 23).any() else 1.0
            return {**outputs, "loss": outputs["loss"] * broken}

    rows, model = Rows(), Breaking()
    rows.ids[:] = 23
    before = weights(model)
    trainer = protect_trainer(Trainer)(
        model=model, args=arguments(tmp_path), train_dataset=rows, trap2=DECOY
    )
    with pytest.raises(TrainingStopped, match="nominal loss is nan at step 0; training stopped"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


@pytest.mark.parametrize("name", GENERATING)
def test_trainers_that_generate_their_batches_are_refused(name: str) -> None:
    generating = type(name, (), {})
    for refused in (generating, type("Mine", (generating,), {})):
        with pytest.raises(Unsupported) as caught:
            protect_trainer(refused)
        assert str(caught.value) == (
            f"{name} generates its batches in training_step, which protection runs twice; "
            "protect the supervised stage that follows instead"
        )


def test_the_protected_class_is_a_named_subclass() -> None:
    protected = protect_trainer(Trainer)
    assert issubclass(protected, Trainer)
    assert protected.__name__ == "ProtectedTrainer"


@pytest.mark.parametrize("switch", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_a_trainer_that_shards_by_itself_is_refused(switch: str, tmp_path: Path) -> None:
    class Sharding(Trainer):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            setattr(self, switch, True)

    with pytest.raises(Unsupported) as caught:
        protect_trainer(Sharding)(model=bert(), args=arguments(tmp_path))
    assert str(caught.value) == (
        "the trainer shards the model by itself (FSDP or DeepSpeed) after protection has taken "
        "note of its parameters; use a loop with Protector, made after fully_shard"
    )
