"""Adapters at another scale, by the outputs of their layers.

Symbols: W0 base weight of a layer; dW what merging its adapter adds; x input; y its output with the
adapter; y0 without; s scale. A layer is linear in its weights, so whatever the algebra of dW

    y0 + s * (y - y0)    is the output with    W0 + s * dW,

values and gradients, and no weight is touched: the base may be quantised, sharded or compiled.
It costs each adapted layer one more pass through its base.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from trap2.protecting.wrappers import is_sharded


class ScaledOutputs:
    """Layers of an adapter whose outputs can be put at another scale.

    Its hooks stay on the layers and do nothing outside `at`; they read the scale from a tensor, so
    that no scale is compiled anew.

    Args:
        layers: The adapter's layers (peft's `BaseTunerLayer`).
        moved: Whether the adapter's initialisation moved the base, as PiSSA's does. W0 is then
            what the layer holds now, base and adapter together.
    """

    def __init__(self, layers: Sequence[nn.Module], moved: bool) -> None:
        self.excess = torch.zeros((), dtype=torch.float64)  # s - 1; alone on the CPU it suits all
        self.active = False
        for layer in layers:
            hook = _Hook(self, _Initial(layer) if moved else None)
            # First in line: a hook of FSDP2 after it gives the base's weights away.
            layer.register_forward_hook(hook, with_kwargs=True, prepend=True)
        torch.compiler.reset()  # what was compiled and run before would never see a hook

    @contextmanager
    def at(self, s: float) -> Iterator[None]:
        """Scale the outputs of the forward passes inside; run their backward passes inside too."""
        self.excess.fill_(s - 1.0)
        self.active = True
        try:
            yield
        finally:
            self.active = False

    def scaled(self, output: Tensor, base: Tensor) -> Tensor:
        """y0 + s * (y - y0), and y bit for bit where s is 1."""
        return output + self.excess * (output - base)


class _Hook:
    """The forward hook of one layer."""

    def __init__(self, outputs: ScaledOutputs, initial: "_Initial | None") -> None:
        self.outputs, self.initial = outputs, initial

    def __call__(
        self, layer: Any, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        if not self.outputs.active:
            return None
        base = layer.get_base_layer()(*inputs, **named)
        if self.initial is not None:
            base = base + self.initial(inputs[0])
        return self.outputs.scaled(output, base)


class _Initial:
    """What a LoRA layer adds to its base's output as it is now."""

    def __init__(self, layer: Any) -> None:
        (name,) = layer.active_adapters
        self.down, self.up = (_frozen_copy(part[name]) for part in (layer.lora_A, layer.lora_B))
        self.scaling = layer.scaling[name]

    def __call__(self, x: Tensor) -> Tensor:
        product: Tensor = self.scaling * self.up(self.down(x.to(self.down.weight.dtype)))
        return product.to(x.dtype)


def _frozen_copy(factor: nn.Module) -> Any:
    """A copy that no optimizer moves, whole where the factor is sharded."""
    copied = deepcopy(factor).requires_grad_(False)
    parts: list[tuple[str, Any]] = list(copied.named_parameters())
    for name, part in parts:
        if is_sharded(part):
            setattr(copied, name, nn.Parameter(part.full_tensor(), requires_grad=False))
    return copied
