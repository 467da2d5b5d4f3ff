"""Symbols: W0 base weights; dW update; s scale. The oracle builds W0 + s * dW as dense weights of a
model that knows nothing of adapters, and differentiates through the building."""

import inspect
import math
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from trap2.errors import TrainingStopped
from trap2.protecting.config import Trap2Config
from trap2.protecting.losses import TRAP_LOSSES, Outcome, readout
from trap2.protecting.protector import Protector
from trap2.protecting.scaled import LiveUpdate
from trap2.protecting.step import trap_step

PREFIX = "base_model.model."


def bert() -> nn.Module:
    config = BertConfig(
        vocab_size=24,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
    )
    return BertForSequenceClassification(config)


def llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=24,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.3,
        )
    )


def gpt2() -> nn.Module:
    sizes = {"vocab_size": 24, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    rates = dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], 0.0)
    return GPT2LMHeadModel(GPT2Config(**sizes, **rates, initializer_range=0.3))


def rows(labels: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    ids = torch.randint(1, 24, (8, 6), generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, "labels": labels(ids)}


def classes(ids: Tensor) -> Tensor:
    return torch.arange(len(ids)) % 3


def tokens(ids: Tensor) -> Tensor:
    labels = ids % 4
    labels[:4, :2] = -100
    return labels


CASES = {
    "bert lora": (bert, classes, {"target_modules": ["query", "dense"]}),
    "bert rslora, head and pooler saved": (
        bert,
        classes,
        {
            "target_modules": ["value", "word_embeddings"],
            "use_rslora": True,
            "modules_to_save": ["classifier", "pooler"],
        },
    ),
    "bert full": (bert, classes, None),
    "llama lora": (llama, tokens, {"target_modules": ["q_proj", "down_proj"]}),
    "gpt2 lora on Conv1D": (
        gpt2,
        tokens,
        {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    ),
    "gpt2 full": (gpt2, tokens, None),
}


class Case:
    """A model somewhere in its training, its dense twin, and the base it came from."""

    def __init__(self, name: str) -> None:
        make, labels, settings = CASES[name]
        torch.manual_seed(0)
        self.twin = make().double()
        torch.manual_seed(0)
        self.model = make().double()
        if settings is not None:
            config = LoraConfig(r=3, lora_alpha=5, **settings)
            self.model = get_peft_model(self.model, config)
        self.scaling = 5 / math.sqrt(3) if (settings or {}).get("use_rslora") else 5 / 3
        self.transposed = bool((settings or {}).get("fan_in_fan_out"))
        self.batch = rows(labels)
        # transformers computes the loss of a causal model in float32.
        self.tolerance = 1e-6 if labels is tokens else 1e-10
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.origin = {n: p.detach().clone() for n, p in self.model.named_parameters()}

    def moved(self) -> "Case":
        """As after some optimizer steps."""
        with torch.no_grad():
            for p in self.trained.values():
                p.add_(0.2 * torch.randn_like(p))
        return self

    def dense(self, s: float) -> dict[str, Tensor]:
        return {name: self._weight(name, s) for name, _ in self.twin.named_parameters()}

    def _weight(self, name: str, s: float) -> Tensor:
        live = dict(self.model.named_parameters())
        head = name.startswith("classifier")
        for full, parameter in live.items():
            if full.removeprefix(PREFIX) == name:
                trained = full in self.trained and not head
                w0 = self.origin[full]
                return w0 + s * (parameter - w0) if trained else parameter
            if full.removeprefix(PREFIX).replace(".modules_to_save.default", "") == name:
                if head:
                    return parameter
                w0 = live[full.replace(".modules_to_save.default", ".original_module")]
                return w0 + s * (parameter - w0)
        module, leaf = (PREFIX + name).rsplit(".", 1)
        w0 = live[f"{module}.base_layer.{leaf}"]
        if leaf == "bias":
            return w0
        if f"{module}.lora_embedding_A.default" in live:
            a, b = (live[f"{module}.lora_embedding_{x}.default"] for x in "AB")
            return w0 + s * self.scaling * (b @ a).T
        a, b = (live[f"{module}.lora_{x}.default.weight"] for x in "AB")
        delta = self.scaling * (b @ a)
        return w0 + s * (delta.T if self.transposed else delta)

    def run(self, s: float, batch: dict[str, Tensor]) -> Outcome:
        output = functional_call(self.twin, self.dense(s), (), batch)
        return Outcome(output.loss, output.logits, batch["labels"])

    def gradient(self, objective: Tensor) -> dict[str, Tensor]:
        given = torch.autograd.grad(objective, list(self.trained.values()))
        return dict(zip(self.trained, given, strict=True))


def assert_same_gradient(case: Case, expected: dict[str, Tensor]) -> None:
    # A floor, because some gradients (of attention key biases) are zero but for rounding.
    floor = 1e-4 * torch.stack([g.norm() for g in expected.values()]).norm()
    for name, p in case.trained.items():
        assert p.grad is not None
        error = (p.grad - expected[name]).norm() / expected[name].norm().clamp_min(floor)
        assert error < case.tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("loss", list(TRAP_LOSSES))
@pytest.mark.parametrize("name", list(CASES))
def test_the_gradient_is_that_of_the_objective_with_dense_weights(name: str, loss: str) -> None:
    case = Case(name)
    config = Trap2Config(
        strength=0.7,
        loss=loss,
        weighting="inverse",
        readout_weight=0.5 if loss == "decoy" else 0.0,
        fraction=0.75,
        memory=0,
        cap=0.0,  # its own oracle is in test_cap.py
        spare=0.0,  # and this one's in test_sparing.py
        scales_per_step=2,
        warmup=0,
        ramp=0,
    )
    protector = Protector(case.model, config)
    case.moved()
    protector.backward(case.batch)
    objective = case.run(1.0, case.batch).loss
    for s, at in zip(config.law_at(0).draw(0, 0, 2), ([0, 3, 6], [2, 4, 7]), strict=True):
        outcome = case.run(s, {key: value[at] for key, value in case.batch.items()})
        trap = TRAP_LOSSES.get(loss)(outcome) + config.readout_weight * readout(outcome)
        objective = objective + 0.7 * (1 / s) * trap / 2
    assert_same_gradient(case, case.gradient(objective))


@pytest.mark.parametrize("name", ["bert lora", "bert full"])
def test_the_paper_preset_is_the_papers_formula(name: str) -> None:
    case = Case(name)
    protector = Protector(case.model, Trap2Config.preset("paper", scale_seed=9))
    case.moved()
    protector.backward(case.batch)
    assert protector.last is not None
    (s,) = protector.last.scales
    assert 0.05 <= s <= 0.95 or 1.05 <= s <= 2.0
    nominal, scaled = (
        F.cross_entropy(
            functional_call(case.twin, case.dense(at), (), case.batch).logits, case.batch["labels"]
        )
        for at in (1.0, s)
    )
    assert_same_gradient(case, case.gradient(nominal - 0.01 * (1 / s) * scaled))
    assert protector.last.nominal == pytest.approx(nominal.item(), rel=1e-12)
    assert protector.last.trap == pytest.approx(-scaled.item(), rel=1e-12)


def tiny() -> tuple[nn.Linear, LiveUpdate]:
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    update = LiveUpdate(model)
    with torch.no_grad():
        model.weight.add_(1.0)
    return model, update


ALWAYS = Trap2Config(loss="hinge", readout_weight=0.0, warmup=0, ramp=0)


def test_a_step_records_what_it_did() -> None:
    model, update = tiny()
    seen: list[tuple[int, float]] = []

    def scaled(part: int, s: float, factor: float) -> Tensor:
        seen.append((part, factor))
        return model.weight.sum() * 0 + float(part)

    config = Trap2Config(
        strength=0.5, scales_per_step=3, weighting="inverse_sqrt", warmup=2, ramp=2
    )

    def nominal() -> Tensor:
        return torch.tensor(2.5)

    quiet = trap_step(nominal, scaled, update=update, config=config, step=1)
    assert (quiet.nominal, quiet.trap, quiet.scales, seen) == (2.5, None, (), [])
    record = trap_step(nominal, scaled, update=update, config=config, step=2)
    assert list(record.scales) == config.law_at(2).draw(0, 2, 3)
    assert record.trap == pytest.approx(1.0)
    # All that is trained is scaled here: the loss carries the chain rule's s.
    expected = [s * 0.25 * s**-0.5 / 3 for s in record.scales]
    assert [part for part, _ in seen] == [0, 1, 2]
    assert [factor for _, factor in seen] == pytest.approx(expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("what", ["nominal loss", "trap loss"])
def test_a_loss_that_is_not_finite_stops_with_the_weights_in_place(bad: float, what: str) -> None:
    model, update = tiny()
    before = model.weight.detach().clone()
    losses = [torch.tensor(bad), torch.tensor(1.0)]
    losses = losses if what == "nominal loss" else losses[::-1]
    with pytest.raises(TrainingStopped) as caught:
        trap_step(
            lambda: losses[0],
            lambda *_: losses[1],
            update=update,
            config=ALWAYS,
            step=7,
        )
    assert str(caught.value) == (
        f"{what} is {bad} at step 7; training stopped before the weights took it: "
        "lower the learning rate or the strength and start again"
    )
    assert torch.equal(model.weight, before)
    assert not any(p._backward_hooks for p in model.parameters())


def test_the_scaled_pass_replays_the_nominal_passes_randomness() -> None:
    _, update = tiny()
    drawn: list[Tensor] = []

    def draw() -> Tensor:
        drawn.append(torch.rand(4))
        return drawn[-1].sum()

    config = Trap2Config(scales_per_step=2, warmup=0, ramp=0)
    torch.manual_seed(3)
    trap_step(draw, lambda *_: draw(), update=update, config=config, step=0)
    after = torch.get_rng_state()
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    torch.manual_seed(3)
    torch.rand(4)
    assert torch.equal(torch.get_rng_state(), after)


def test_the_step_fits_on_one_screen() -> None:
    assert len(inspect.getsource(trap_step).splitlines()) <= 50
