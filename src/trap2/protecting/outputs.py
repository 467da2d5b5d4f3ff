"""Adapters at another scale, by the outputs of their layers.

Symbols: W0 base weight of a layer; dW what merging its adapter adds; x input; y its output with the
adapter; y0 without; s scale. A layer is linear in its weights, so whatever the algebra of dW

    y0 + s * (y - y0)    is the output with    W0 + s * dW,

values and gradients, and no weight is touched: the base may be quantised, sharded or compiled.
It costs each adapted layer one more pass through its base.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from trap2.errors import Unsupported


class ScaledOutputs:
    """Layers of an adapter whose outputs can be put at another scale.

    Its hooks stay on the layers and do nothing outside `at`. They are made once, because a compiled
    model sees no hook that is added after its first call; they read the scale from a tensor, so
    that no scale is compiled anew.

    Args:
        layers: The adapter's layers (peft's `BaseTunerLayer`).
        moved: Whether the adapter's initialisation moved the base, as PiSSA's does. W0 is then
            what the layer holds now, base and adapter together.
    """

    def __init__(self, layers: Sequence[nn.Module], moved: bool) -> None:
        self.excess = torch.zeros((), dtype=torch.float64)  # s - 1; alone on the CPU it suits all
        self.active = self._ran = False
        for layer in layers:
            hook = _Hook(self, _initial_product(layer) if moved else None)
            # First in line: a hook of FSDP2 after it gives the base's weights away.
            layer.register_forward_hook(hook, with_kwargs=True, prepend=True)

    @contextmanager
    def at(self, s: float) -> Iterator[None]:
        """Scale the outputs of the forward passes inside; run their backward passes inside too.

        Raises:
            Unsupported: No hook ran.
        """
        self.excess.fill_(s - 1.0)
        self.active, self._ran = True, False
        try:
            yield
        finally:
            self.active = False
        if not self._ran:
            raise Unsupported(
                "no layer of the adapter was scaled: the model had been compiled and run before "
                "protection; make the protector before the first call of the compiled model"
            )

    def scaled(self, output: Tensor, base: Tensor) -> Tensor:
        """y0 + s * (y - y0), and y bit for bit where s is 1."""
        self._ran = True
        return output + self.excess * (output - base)


class _Hook:
    """The forward hook of one layer."""

    def __init__(self, outputs: ScaledOutputs, initial: Callable[[Tensor], Tensor] | None) -> None:
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


def _initial_product(layer: Any) -> Callable[[Tensor], Tensor]:
    """What a LoRA layer adds to its base's output as it is now."""
    (name,) = layer.active_adapters
    down, up = (deepcopy(part[name]).requires_grad_(False) for part in (layer.lora_A, layer.lora_B))
    scaling = layer.scaling[name]

    def initial(x: Tensor) -> Tensor:
        product: Tensor = scaling * up(down(x.to(down.weight.dtype)))
        return product.to(x.dtype)

    return initial
