"""Adapters on bases quantised by bitsandbytes: the scaled model is the dequantised one's.

Symbols: Wq the base weight as its layer computes with it; dW the adapter's update; s scale.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers import BertModel, BitsAndBytesConfig

from every_adapter import bert, move
from trap2.protecting.scaled import LiveUpdate

BITS: dict[str, dict[str, Any]] = {
    "4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.float32,
    },
    "4, twice": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    },
    "8": {"load_in_8bit": True},
}
ADAPTERS: dict[str, dict[str, Any]] = {"LoRA": {}, "DoRA": {"use_dora": True}}
IDS = torch.randint(1, 24, (3, 7), generator=torch.Generator().manual_seed(3))


def adapted(model: Any, adapter: str) -> Any:
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["query", "value"], **ADAPTERS[adapter])
    return get_peft_model(model, config).train()


def quantised(folder: Path, bits: str, adapter: str) -> Any:
    bert().save_pretrained(folder)
    settings = BitsAndBytesConfig(**BITS[bits])
    model = BertModel.from_pretrained(folder, quantization_config=settings, device_map="cpu")
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return adapted(model, adapter)


def dequantised(model: Any, adapter: str) -> Any:
    """The same adapter on a base of Wq in float32."""
    plain = bert()
    quantised_layers = dict(model.get_base_model().named_modules())
    for name, layer in plain.named_modules():
        if isinstance(layer, nn.Linear):
            ours = quantised_layers.get(f"{name}.base_layer", quantised_layers[name])
            layer.weight.data = dequantize_module_weight(ours).float().clone()
    twin = adapted(plain, adapter)
    set_peft_model_state_dict(twin, get_peft_model_state_dict(model))
    return twin


def run(model: nn.Module) -> Tensor:
    output: Any = model(input_ids=IDS)
    pooled: Tensor = output.pooler_output
    return pooled


CASES = [(bits, adapter) for bits in BITS for adapter in ADAPTERS]
CASES.remove(("8", "DoRA"))  # peft and bitsandbytes alone do not run it on a CPU


@pytest.mark.parametrize(("bits", "adapter"), CASES)
def test_a_quantised_base_is_scaled_as_its_dequantised_twin(
    bits: str, adapter: str, tmp_path: Path
) -> None:
    model = quantised(tmp_path, bits, adapter)
    kinds = {type(module).__name__ for module in model.modules()}
    assert kinds & {"Linear4bit", "Linear8bitLt"}
    update = LiveUpdate(model)
    move(model)
    twin = dequantised(model, adapter)
    twin_update, plain = LiveUpdate(twin), run(model)
    W0, W1 = (
        copy.deepcopy(twin).unload().state_dict(),
        copy.deepcopy(twin).merge_and_unload().state_dict(),
    )
    for s in (0.0, 0.37, 1.6):
        expected = bert()
        expected.load_state_dict({n: W0[n] + s * (W1[n] - W0[n]) for n in W0})
        gradients = []
        for trained, live in ((model, update), (twin, twin_update)):
            trained.zero_grad()
            with live.at(s) as chain:
                output = run(trained)
                (chain * output.square().sum()).backward()
            torch.testing.assert_close(output, run(expected), rtol=1e-4, atol=1e-5)
            gradients.append(
                [
                    p.grad.clone()
                    for p in trained.parameters()
                    if p.requires_grad and p.grad is not None
                ]
            )
        for one, two in zip(*gradients, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)
    assert torch.equal(run(model), plain)
