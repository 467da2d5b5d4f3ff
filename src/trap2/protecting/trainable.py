"""Which weights of a model a recipe trains: an adapter on its encoder, or all of it."""

from functools import partial
from typing import Any, cast

from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from trap2.errors import UserError
from trap2.recipes import Recipe
from trap2.tasks.model import DescriptionClassifier


def trainable(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Make the model's encoder trainable as the recipe says: an adapter on it, or all of it."""
    described = isinstance(model, DescriptionClassifier)
    if recipe.method == "full":
        for name, parameter in model.named_parameters():
            # A description head reads hidden states: the pooler gets no gradient.
            parameter.requires_grad = not (described and "pooler" in name)
        return model
    spec = recipe.lora
    language = recipe.task.is_language
    encoder: Any = model.encoder if described else model
    heads = [] if described or language else _heads(model)
    adapter = LoraConfig(
        r=spec.r,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]
        lora_dropout=spec.dropout,
        use_rslora=spec.rslora,
        use_dora=spec.dora,
        target_modules=linear_maps(encoder, heads)
        if spec.targets == "all-linear"
        else spec.targets,
        modules_to_save=heads or None,
        task_type=TaskType.CAUSAL_LM if language else None,
    )
    try:
        adapted: Any = get_peft_model(encoder, adapter)
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"lora.targets={spec.targets}: {reason}; name modules it has") from error
    adapted.peft_config["default"].base_model_name_or_path = recipe.base
    for module in encoder.modules():
        if isinstance(module, _BatchNorm):
            # An adapter does not carry running statistics: train with the base's own.
            layer: Any = module.eval()
            layer.train = partial(_unmoved, layer)
    if described:
        model.encoder = adapted
        return model
    return cast(nn.Module, adapted)


def _unmoved(layer: nn.Module, mode: bool = True) -> nn.Module:
    """`train` of a layer that stays in evaluation mode."""
    return layer


def _heads(model: nn.Module) -> list[str]:
    """Modules with weights outside the encoder: the task's own, to be released whole."""
    return [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    ]


def linear_maps(encoder: nn.Module, heads: list[str]) -> list[str]:
    """Every linear map of the encoder (pointwise convolutions are linear maps), in module order.

    The output layer of a language model is left out: it may be tied to the embedding.
    """
    outputs = getattr(encoder, "get_output_embeddings", lambda: None)()
    names = []
    for name, module in encoder.named_modules():
        pointwise = (
            isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
        )
        linear = isinstance(module, nn.Linear) or pointwise
        if linear and module is not outputs and name.split(".")[0] not in heads:
            names.append(name)
    return [name for name in names if "pooler" not in name]


def checkpoint_activations(encoder: Any, recipe: Recipe) -> None:
    """Recompute activations in the backward pass; done here because a head may hide the encoder."""
    try:
        encoder.gradient_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise UserError(
            f"base {recipe.base} does not support training.gradient_checkpointing; set it to false"
        ) from error
