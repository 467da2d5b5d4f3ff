"""Trap rows that ride in the nominal pass leave the gradients of a pass of their own."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import trainees
from trainees import DECOY, lora, move, ragged, stacked
from trap2.errors import TrainingStopped, Unsupported
from trap2.protecting import joint
from trap2.protecting.config import Trap2Config
from trap2.protecting.losses import Outcome
from trap2.protecting.protector import Protector, default_forward
from trap2.protecting.trainer import protect_trainer

HIDING = replace(DECOY, readout_weight=3.0, memory=128, fraction=0.5, strength=2.0)
BATCHES = [stacked(ragged()), stacked(ragged()[::-1])]


def trained(
    config: Trap2Config, steps: int = 3, **more: Any
) -> tuple[list[Any], dict[str, Tensor]]:
    """Records and gradients of some steps, at rising weights, in float64."""
    model = lora().double()
    protector = Protector(model, config, **more)
    move(model)
    records, found = [], {}
    for step in range(steps):
        for batch in BATCHES[: more.get("accumulation_steps", 1)]:
            protector.backward(batch)
            records.append(protector.last)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found[f"{step} {name}"] = parameter.grad.clone()
                parameter.data.add_(parameter.grad, alpha=-0.1)
                parameter.grad = None
    assert not any("forward" in vars(module) for module in model.modules())
    return records, found


# Of two traps, the cap judges what they come to together; in passes of their own, each.
@pytest.mark.parametrize(("cap", "passes"), [(0.0, 1), (1.0, 1), (0.0, 2)])
@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.usefixtures("way")
def test_one_pass_gives_what_several_give(cap: float, passes: int, micro: int) -> None:
    config = replace(HIDING, cap=cap, scales_per_step=passes)
    apart, several = trained(config, accumulation_steps=micro)
    together, one = trained(replace(config, one_pass=True), accumulation_steps=micro)
    assert one.keys() == several.keys()
    for name, gradient in one.items():
        # transformers computes a causal model's loss in float32
        torch.testing.assert_close(gradient, several[name], rtol=1e-3, atol=1e-5)
    for first, second in zip(apart, together, strict=True):
        assert first.nominal == pytest.approx(second.nominal, rel=1e-5)
        assert first.scales == second.scales
        assert first.trap == pytest.approx(second.trap, rel=1e-4)


def test_a_trainer_trains_the_same_weights(tmp_path: Path) -> None:
    def run(**changes: Any) -> tuple[list[float], dict[str, Tensor]]:
        model = lora()
        trainer = protect_trainer(Trainer)(
            model=model,
            args=TrainingArguments(**trainees.settings(tmp_path, max_steps=4)),
            train_dataset=ragged(),
            data_collator=stacked,
            trap2=replace(HIDING, cap=1.0, **changes),
        )
        trainer.train()
        assert trainer.last.scales
        logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return logged, {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    (losses, several), (others, one) = run(), run(one_pass=True)
    assert losses == pytest.approx(others, rel=1e-4)
    for name, weight in one.items():
        torch.testing.assert_close(weight, several[name], rtol=1e-3, atol=1e-5)


def test_a_trap_that_is_not_finite_is_dropped() -> None:
    def breaking(model: nn.Module, batch: Mapping[str, Any]) -> Outcome:
        outcome = default_forward(model, batch)
        assert outcome.logits is not None
        rows = len(BATCHES[0]["labels"])
        logits = outcome.logits.clone()
        logits[rows:] *= torch.inf
        return replace(outcome, logits=logits)

    config = replace(HIDING, one_pass=True)
    (record,), found = trained(config, steps=1, forward=breaking)
    (plain,), nominal = trained(replace(config, strength=0.0), steps=1)
    assert (record.trap, record.dropped) == (None, 1)
    assert record.nominal == pytest.approx(plain.nominal)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, nominal[name], rtol=1e-4, atol=1e-7)


def test_a_nominal_loss_that_is_not_finite_stops_training() -> None:
    def breaking(model: nn.Module, batch: Mapping[str, Any]) -> Outcome:
        outcome = default_forward(model, batch)
        return replace(outcome, loss=outcome.loss * (torch.nan if model.training else 1.0))

    with pytest.raises(TrainingStopped, match="nominal loss is nan at step 0"):
        trained(replace(HIDING, one_pass=True), steps=1, forward=breaking)


def refused(model: nn.Module, config: Trap2Config = HIDING, **more: Any) -> str:
    with pytest.raises(Unsupported) as caught:
        Protector(model, replace(config, one_pass=True), **more).backward(BATCHES[0])
    assert not any("forward" in vars(module) for module in model.modules())
    return str(caught.value)


def test_what_cannot_ride_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused(trainees.llama()) == (
        "one_pass=True: it needs a plain LoRA adapter of linear layers alone, and "
        "'model.embed_tokens.weight' is trained; leave one_pass off"
    )
    hinge = replace(HIDING, loss="hinge", readout_weight=0.0)
    assert refused(lora(), hinge) == (
        "one_pass=True: loss=hinge is made of each row's own loss, which one pass does not give; "
        "leave one_pass off"
    )
    normalised = lora()
    normalised.add_module("norm", nn.BatchNorm1d(2, affine=False))
    assert "in batch norm the rows see each other" in refused(normalised)
    assert "surrogates change the weights" in refused(lora(), replace(HIDING, surrogates="bank"))
    monkeypatch.setattr(joint, "processes", lambda: 2)
    assert "it is for one process, and there are 2" in refused(lora())


def test_rows_that_see_each_other_are_found_out() -> None:
    def mixing(model: nn.Module, batch: Mapping[str, Any]) -> Outcome:
        outcome = default_forward(model, batch)
        return replace(outcome, loss=outcome.loss + 0.1 * len(batch["labels"]))

    said = refused(lora(), forward=mixing)
    assert "so its rows are not by themselves; leave one_pass off" in said

    def flat(model: Any, batch: Mapping[str, Any]) -> Outcome:
        linear = next(m for n, m in model.named_modules() if n.endswith("lora_A.default"))
        linear(torch.zeros(3, linear.in_features))
        return default_forward(model, batch)

    model = lora()
    assert "a layer gets (3, " in refused(model, forward=flat)
    assert all(module.training for module in model.modules())


def test_a_trainer_with_a_loss_of_its_own_is_refused(tmp_path: Path) -> None:
    class Own(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(model, inputs, *args, **kwargs)

    with pytest.raises(Unsupported) as caught:
        protect_trainer(Own)(
            model=lora(),
            args=TrainingArguments(**trainees.settings(tmp_path, max_steps=1)),
            train_dataset=ragged(),
            trap2=replace(HIDING, one_pass=True),
        )
    assert str(caught.value) == (
        "one_pass=True: the trainer has a way of its own to its loss; leave one_pass off"
    )
