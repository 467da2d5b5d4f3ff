"""What an attacker has of a model beside its update: unlabelled rows, and a way to run them.

Symbols: W0 base tensor; dW update. Nothing is changed in place: the live model computes with
`W0 + dW` for the length of one call, and gradients flow back to dW.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from trap2.attacks.live import LiveModel

Deltas = Mapping[str, Tensor]
"""Updates by base tensor name; a tensor that is not there stays at the base."""

Batch = Mapping[str, Tensor]
"""Some rows as the model takes them."""

BATCH = 16
"""Rows per forward pass."""

_SERIALS = count()


class Unlabelled:
    """One task's unlabelled rows in front of the live model, under the task's own head.

    Args:
        live: The live model, holding its base.
        model: The same model under the head; called with a batch it gives `.logits`.
        rows: How many rows there are.
        batch: Makes a batch of the rows at some places.

    Attributes:
        serial: A number no other rows of this process have, so that what is worked out from them
            can be remembered by it.
    """

    def __init__(
        self,
        live: LiveModel,
        model: nn.Module,
        rows: int,
        batch: Callable[[Sequence[int]], Batch],
    ) -> None:
        self.model, self.rows, self.batch, self.serial = model, rows, batch, next(_SERIALS)
        prefix = next(f"{n}." if n else "" for n, m in model.named_modules() if m is live.model)
        self._own = {name: prefix + own for name, own in live.own_names.items()}
        self._base = model.state_dict()
        self._parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def batches(self, size: int = BATCH) -> Iterator[Batch]:
        """All rows, in order."""
        for start in range(0, self.rows, size):
            yield self.batch(range(start, min(start + size, self.rows)))

    def base(self, name: str) -> Tensor:
        """One base tensor, as the live model holds it."""
        found: Tensor = self._base[self._own[name]]
        return found

    def logits(self, deltas: Deltas, batch: Batch) -> Tensor:
        """Logits (N, C) of one batch at W0 + dW, differentiable in dW."""
        logits: Tensor = functional_call(self.model, self.weights(deltas), (), dict(batch)).logits
        return logits

    def weights(self, deltas: Deltas) -> dict[str, Tensor]:
        """W0 + dW under the names of the model with its head; buffers take no gradient.

        Running variances that merge to below zero are none, and are cut there: the answers of such
        a merge are no numbers, and what is trained on them is none either.
        """
        found = {self._own[name]: self.base(name) + delta for name, delta in deltas.items()}
        for name in [n for n in found if n not in self._parameters]:
            found[name] = found[name].detach()
            if name.endswith("running_var"):
                found[name] = found[name].clamp_min(0.0)
        return found

    def linear(self, names: Iterable[str]) -> dict[str, nn.Linear]:
        """Those of the named tensors that are the weight of a linear layer, with the layer."""
        modules = dict(self.model.named_modules())
        owners = {name: modules.get(self._own[name].removesuffix(".weight")) for name in names}
        return {name: found for name, found in owners.items() if isinstance(found, nn.Linear)}

    @torch.no_grad()
    def see(
        self,
        deltas: Deltas,
        names: Iterable[str],
        show: Callable[[str, Tensor], None],
        batches: Iterable[Batch] | None = None,
        once: bool = False,
    ) -> None:
        """Run rows at W0 + dW and show what goes into linear layers.

        Args:
            deltas: dW by base tensor name.
            names: Weights of linear layers.
            show: Called with a name and that layer's inputs (tokens, in) for every batch, in the
                order in which the layers run; padding is left out.
            batches: Which rows; by default all of them.
            once: Show each layer once a batch, and run no further than that takes.
        """
        layers = self.linear(names)
        for batch in self.batches() if batches is None else batches:
            mask, left = batch.get("attention_mask"), dict.fromkeys(layers)

            def look(
                name: str, inputs: Tensor, mask: Any = mask, left: dict[str, None] = left
            ) -> None:
                show(name, _tokens(inputs, mask))
                left.pop(name, None)
                if once and not left:
                    raise _AllSeen

            hooks = [
                layer.register_forward_pre_hook(
                    lambda _, inputs, name=name, look=look: look(name, inputs[0])
                )
                for name, layer in layers.items()
            ]
            try:
                with suppress(_AllSeen):
                    self.logits(deltas, batch)
            finally:
                for hook in hooks:
                    hook.remove()


class _AllSeen(Exception):
    """Ends a run of the model that has shown what it was run for."""


def _tokens(inputs: Tensor, mask: Tensor | None) -> Tensor:
    """The inputs (tokens, in) of a layer, without those that belong to padding."""
    if mask is not None and inputs.shape[:-1] == mask.shape:
        return inputs[mask.bool()]
    return inputs.reshape(-1, inputs.shape[-1])
