import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification

from trap2.errors import TrainingStopped, Unsupported, UserError
from trap2.protecting.config import Trap2Config
from trap2.protecting.losses import Outcome
from trap2.protecting.protector import Protector, default_forward

DECOY = Trap2Config(strength=0.5, readout_weight=0.0, fraction=1.0, cap=0.0, warmup=0, ramp=0)


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
    return BertForSequenceClassification(config).train()


def lora(dropout: float = 0.0) -> nn.Module:
    settings = {"r": 4, "lora_dropout": dropout, "modules_to_save": ["classifier"]}
    return get_peft_model(bert(dropout), LoraConfig(target_modules=["query", "dense"], **settings))


def batches(count: int, rows: int = 8) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "input_ids": torch.randint(1, 24, (rows, 6), generator=generator),
            "labels": torch.randint(0, 3, (rows,), generator=generator),
        }
        for _ in range(count)
    ]


def move(model: nn.Module) -> None:
    """As after some optimizer steps: an update of zero would hide every mistake."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], rtol: float) -> None:
    assert ours.keys() == theirs.keys()
    floor = 1e-4 * max(value.norm().item() for value in theirs.values())
    for name, value in theirs.items():
        error = (ours[name] - value).norm() / value.norm().clamp_min(floor)
        assert error < rtol, f"{name}: relative error {error:.1e}"


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)


def train(
    model: nn.Module, backward: Callable[[dict[str, Tensor]], Any], steps: int
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Final weights, and the state of the random stream after every step."""
    optimizer = optimizer_of(model)
    torch.manual_seed(42)
    states = []
    for batch in batches(steps):
        backward(batch)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        states.append(torch.get_rng_state())
    return {name: value.clone() for name, value in model.state_dict().items()}, states


@pytest.mark.parametrize("make", [bert, lora])
def test_strength_zero_is_bit_for_bit_the_plain_loop(make: Callable[[float], nn.Module]) -> None:
    model = make(0.2)
    plain, _ = train(model, lambda batch: model(**batch).loss.backward(), 4)
    again = make(0.2)
    ours, _ = train(again, Protector(again, Trap2Config(strength=0.0)).backward, 4)
    assert all(torch.equal(value, ours[name]) for name, value in plain.items())


@pytest.mark.parametrize("make", [bert, lora])
def test_the_users_random_stream_is_that_of_the_plain_loop(
    make: Callable[[float], nn.Module],
) -> None:
    model = make(0.2)
    plain, plain_states = train(model, lambda batch: model(**batch).loss.backward(), 5)
    again = make(0.2)
    config = Trap2Config(warmup=2, ramp=2, scales_per_step=2)
    protector = Protector(again, config)
    ours, states = train(again, protector.backward, 5)
    assert protector.last is not None
    assert protector.last.trap is not None
    assert all(torch.equal(a, b) for a, b in zip(states, plain_states, strict=True))
    assert not all(torch.equal(value, ours[name]) for name, value in plain.items())


def test_the_returned_loss_is_the_nominal_one() -> None:
    model = bert()
    (batch,) = batches(1)
    expected = model(**batch).loss.detach()
    protector = Protector(model, DECOY)
    assert torch.equal(protector.backward(batch), expected)
    assert protector.last is not None
    assert protector.last.trap != protector.last.nominal


@pytest.mark.parametrize("rows_each", [1, 2])
@pytest.mark.parametrize("make", [bert, lora])
def test_micro_batches_add_up_to_the_whole_batch(
    make: Callable[[], nn.Module], rows_each: int
) -> None:
    def accumulated(rows: int) -> tuple[dict[str, Tensor], list[float]]:
        model = make().double()
        protector = Protector(model, DECOY, accumulation_steps=8 // rows)
        move(model)
        (batch,) = batches(1)
        scales = []
        for start in range(0, 8, rows):
            protector.backward({k: v[start : start + rows] for k, v in batch.items()})
            assert protector.last is not None
            scales += protector.last.scales
        return gradients(model), scales

    whole, (s,) = accumulated(8)
    parts, scales = accumulated(rows_each)
    assert set(scales) == {s}
    assert_close(parts, whole, 1e-10)


def test_every_optimizer_step_has_its_own_scale() -> None:
    model = bert()
    protector = Protector(model, DECOY, accumulation_steps=2)
    seen = []
    for batch in batches(6, rows=2):
        protector.backward(batch)
        assert protector.last is not None
        seen.append(protector.last.scales[0])
    assert seen[0::2] == seen[1::2]
    assert seen[0::2] == [DECOY.law_at(step).draw(0, step)[0] for step in range(3)]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("make", [bert, lora])
def test_gradient_checkpointing_changes_no_gradient(
    make: Callable[[float], nn.Module], reentrant: bool
) -> None:
    def run(checkpointing: bool) -> dict[str, Tensor]:
        model = make(0.1).double()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        protector = Protector(model, Trap2Config(warmup=0, ramp=0))
        move(model)
        torch.manual_seed(3)
        protector.backward(batches(1)[0])
        return gradients(model)

    assert_close(run(True), run(False), 1e-10)


@pytest.mark.parametrize("make", [bert, lora])
def test_the_autocast_cache_does_not_hide_the_scaled_weights(make: Callable[[], nn.Module]) -> None:
    def cast(model: nn.Module, batch: Mapping[str, Any]) -> Outcome:
        with torch.autocast("cpu", torch.bfloat16):  # its own context per pass: no cache to go old
            return default_forward(model, batch)

    def run(forward: Any, around: bool) -> tuple[dict[str, Tensor], float]:
        model = make()
        protector = Protector(model, DECOY, forward=forward)
        move(model)
        with torch.autocast("cpu", torch.bfloat16) if around else nullcontext():
            protector.backward(batches(1)[0])
            after = model(**batches(1)[0]).loss.item()
        assert protector.last is not None
        assert protector.last.trap is not None
        assert not around or after == protector.last.nominal  # nor the restored ones afterwards
        return gradients(model), protector.last.trap

    inside, trap = run(default_forward, True)
    apart, expected = run(cast, False)
    assert trap == expected
    assert all(torch.equal(inside[name], value) for name, value in apart.items())


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        self.classifier = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.body(x))


def image_loss(model: nn.Module, batch: Mapping[str, Any]) -> Outcome:
    logits = model(batch["x"])
    return Outcome(F.cross_entropy(logits, batch["labels"]), logits, batch["labels"])


def images() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"x": torch.randn(6, 1, 4, 4), "labels": torch.arange(6) % 3}


def test_batch_norm_statistics_see_the_nominal_pass_only() -> None:
    plain, model = Conv(), Conv()
    protector = Protector(model, DECOY, forward=image_loss)
    batch = images()
    for step in range(1, 4):
        image_loss(plain, batch)
        protector.backward(batch)
        assert protector.last is not None
        assert protector.last.trap is not None
        for name, value in plain.named_buffers():
            assert torch.equal(dict(model.named_buffers())[name], value), name
        assert model.body[1].num_batches_tracked == step


@pytest.mark.parametrize("training", [True, False])
def test_the_trap_sees_whole_batches_where_batch_norm_ties_their_rows(training: bool) -> None:
    model, seen = Conv().train(training), list[int]()

    def counting(model: nn.Module, batch: Mapping[str, Any]) -> Outcome:
        seen.append(len(batch["x"]))
        return image_loss(model, batch)

    config = Trap2Config(fraction=0.5, min_rows=1, warmup=0, ramp=0)
    Protector(model, config, forward=counting).backward(images())
    assert seen == [6, 6 if training else 3]


def test_weights_are_untouched_by_a_step_and_by_a_failing_one() -> None:
    model = Conv()
    calls: list[int] = []

    def failing(model: nn.Module, batch: Mapping[str, Any]) -> Outcome:
        calls.append(len(calls))
        if len(calls) == 4:
            raise MemoryError("scaled pass")
        return image_loss(model, batch)

    protector = Protector(model, DECOY, forward=failing)
    move(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    protector.backward(images())
    with pytest.raises(MemoryError, match="scaled pass"):
        protector.backward(images())
    assert len(calls) == 4
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert not p._backward_hooks
    assert model.body[1].track_running_stats


def test_a_resumed_run_draws_the_scales_and_reaches_the_weights_of_an_unbroken_one() -> None:
    config = Trap2Config(warmup=1, ramp=3)

    def steps(
        model: nn.Module, protector: Protector, optimizer: Any, data: list
    ) -> list[tuple[float, ...]]:
        scales = []
        for batch in data:
            protector.backward(batch)
            optimizer.step()
            optimizer.zero_grad()
            assert protector.last is not None
            scales.append(protector.last.scales)
        return scales

    data = batches(6)
    model = bert()
    unbroken = Protector(model, config)
    optimizer = optimizer_of(model)
    first = steps(model, unbroken, optimizer, data[:3])
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), unbroken.state_dict()))
    second = steps(model, unbroken, optimizer, data[3:])

    again = bert()
    resumed = Protector(again, config)
    optimizer = optimizer_of(again)
    again.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    resumed.load_state_dict(saved[2])
    assert steps(again, resumed, optimizer, data[3:]) == second
    assert len({*first, *second}) == 6  # one of them the warm-up's empty tuple
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_the_loss_is_handed_to_the_users_backward() -> None:
    model, scaled_by = bert(), 4.0
    doubled = Protector(model, DECOY, backward=lambda loss: (scaled_by * loss).backward())
    doubled.backward(batches(1)[0])
    plain = bert()
    Protector(plain, DECOY).backward(batches(1)[0])
    expected = {name: scaled_by * value for name, value in gradients(plain).items()}
    assert_close(gradients(model), expected, 1e-5)


def test_a_model_without_logits_can_be_protected_with_hinge() -> None:
    model = nn.Linear(4, 2)

    def regression(model: nn.Module, batch: Mapping[str, Any]) -> Outcome:
        return Outcome(F.mse_loss(model(batch["x"]), batch["y"]))

    batch = {"x": torch.randn(4, 4), "y": torch.randn(4, 2)}
    settings = {"readout_weight": 0.0, "warmup": 0, "ramp": 0}
    protector = Protector(model, Trap2Config(loss="hinge", **settings), forward=regression)
    protector.backward(batch)
    assert protector.last is not None
    assert protector.last.trap is not None
    with pytest.raises(UserError, match="use loss=hinge with readout_weight=0"):
        Protector(model, DECOY, forward=regression).backward(batch)


def test_a_loss_that_is_not_a_number_stops_before_the_optimizer() -> None:
    model = Conv()
    protector = Protector(model, DECOY, forward=image_loss)
    batch = {**images(), "x": torch.full((6, 1, 4, 4), torch.nan)}
    with pytest.raises(TrainingStopped, match="nominal loss is nan at step 0; training stopped"):
        protector.backward(batch)


class DeepSpeedEngine(nn.Module):
    """Named as DeepSpeed's, which takes minutes to build and is not installed for tests."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def partitioned(model: nn.Module) -> nn.Module:
    """As ZeRO-3 marks parameters."""
    for i, parameter in enumerate(model.parameters()):
        parameter.ds_id = i  # type: ignore[attr-defined]
    return model


def fsdp1(model: nn.Module) -> nn.Module:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("wrap", "name"),
    [(DeepSpeedEngine, "DeepSpeed"), (partitioned, "DeepSpeed"), (fsdp1, "FSDP1")],
)
def test_what_keeps_weights_in_buffers_of_its_own_is_refused(
    wrap: Callable[[nn.Module], nn.Module], name: str
) -> None:
    with pytest.raises(Unsupported) as caught:
        Protector(wrap(nn.Linear(2, 2)))
    assert str(caught.value) == (
        f"{name} keeps weights in buffers of its own, where a scale can be lost unseen; shard "
        "with fully_shard (FSDP2), or use DDP: see docs/trainers.md"
    )


def test_accumulation_steps_must_be_positive() -> None:
    with pytest.raises(UserError, match="accumulation_steps=0; it must be 1 or more"):
        Protector(bert(), accumulation_steps=0)


@pytest.mark.parametrize(("accumulation", "rows", "seen"), [(1, 16, 6), (2, 16, 3), (1, 64, 13)])
def test_a_small_share_of_a_step_still_has_rows_enough(
    accumulation: int, rows: int, seen: int
) -> None:
    protector = Protector(bert(), Trap2Config(warmup=0, ramp=0), accumulation_steps=accumulation)
    protector.backward(batches(1, rows)[0])
    assert len(protector.objective.memory.state_dict()["labels"]) == seen


@pytest.mark.parametrize("make", [bert, lora])
def test_padding_that_the_trap_pass_leaves_out_changes_no_gradient(make, monkeypatch):
    mask = (torch.arange(14) < torch.tensor([3, 5, 14, 6])[:, None]).long()
    ids = torch.randint(1, 24, mask.shape, generator=torch.Generator().manual_seed(0)) * mask
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 2, 1])}
    config, found, lengths = Trap2Config(fraction=0.5, min_rows=1, warmup=0, ramp=0), [], []

    def forward(model, rows):
        lengths.append(rows["input_ids"].shape[1])
        return default_forward(model, rows)

    for crops in (True, False):
        if not crops:
            monkeypatch.setattr("trap2.protecting.batches.cropped", dict)
        model = make().double()
        protector = Protector(model, config, forward=forward)
        move(model)
        protector.backward(batch)
        found.append(gradients(model))
    assert lengths == [14, 6, 14, 14]
    assert_close(found[0], found[1], rtol=1e-6)
