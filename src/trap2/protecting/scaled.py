"""The update being trained, and the model with that update at another scale.

Symbols: W0 origin of a parameter (the base; zero for `lora_B`); p its current value; s scale.
Inside `LiveUpdate.at(s)` every shared parameter holds W0 + s * (p - W0): no second model, no second
graph, and gradient checkpointing recomputes with the right weights as long as
the backward pass runs inside too. The map is element-wise: of a sharded parameter each process
scales its own shard. Adapters that no parameter scales are scaled by `outputs.py`.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trap2.errors import UserError
from trap2.naming import is_head
from trap2.protecting.origins import Origin, copy_of, origins
from trap2.protecting.outputs import ScaledOutputs
from trap2.protecting.preflight import check
from trap2.protecting.tuners import TOKENS, Adapter, inner_name
from trap2.protecting.wrappers import is_sharded, local, reshard, resharding


@dataclass(frozen=True)
class Shared:
    """One trained parameter that a merge would re-scale. `origin` None stands for zero."""

    name: str
    parameter: nn.Parameter
    origin: Origin | None


class LiveUpdate:
    """The part of a model in training that a release would share with its base.

    For LoRA and rsLoRA that is every `lora_B` (scaling A as well would give s squared) and what is
    saved beside the adapter; for another adapter the outputs of its layers; for full fine-tuning
    every trained parameter, measured from its value now. Task heads are not part of it.

    Args:
        model: The model, before its first optimizer step and before it is run compiled.
        base_files: Folder of the base; full fine-tuning reads from there where it started and
            holds no copy of what the files have.

    Attributes:
        shared: What is scaled in place.
        parameters: All trained parameters but those of heads.

    Raises:
        UserError: Nothing is trainable, or the head alone; no weights in `base_files`.
        Unsupported: The update could not be scaled exactly.
    """

    def __init__(self, model: nn.Module, base_files: str = "") -> None:
        self.model = model
        # Walking a model's modules is slow: what a step needs of them is looked up once.
        self._all, self._resharding = [*model.parameters()], resharding(model)
        self._norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        names = [name for name, _ in trained]
        if not names:
            raise UserError("the model has 0 trainable parameters; unfreeze it or add an adapter")
        adapter = Adapter(model)
        check(model, adapter)
        apart = [(name, p) for name, p in trained if not is_head(inner_name(name))]
        self.parameters = [p for _, p in apart]
        if not apart:
            raise UserError(
                f"only head parameters are trainable ({', '.join(names[:3])}); nothing would be "
                "shared with the base, so there is nothing to protect: unfreeze the encoder"
            )
        self._outputs: ScaledOutputs | None = None
        self._rooms: dict[str, Tensor] = {}
        if not adapter:
            starts = origins(apart, base_files)
            self.shared = [
                Shared(*named, start) for named, start in zip(apart, starts, strict=True)
            ]
            return
        self.shared = list(_in_place(model, adapter))
        if not adapter.is_linear:
            layers = [layer for layer in adapter.layers if not hasattr(layer, TOKENS)]
            self._outputs = ScaledOutputs(layers, adapter.moved_base)

    @property
    def device(self) -> torch.device:
        """Where the update lies."""
        return self.parameters[0].device

    @property
    def is_sum(self) -> bool:
        """Whether the update is added to the base's own weights, which may then be others."""
        return self._outputs is None

    @property
    def ties_rows(self) -> bool:
        """Whether the rows of a batch are normalised together: a part of them is another matter."""
        return any(layer.training or not layer.track_running_stats for layer in self._norms)

    @contextmanager
    def frozen_statistics(self) -> Iterator[None]:
        """Batch-norm layers normalise as before but leave their running statistics alone."""
        layers = [layer for layer in self._norms if layer.track_running_stats]
        for layer in layers:
            layer.track_running_stats = False
        try:
            yield
        finally:
            for layer in layers:
                layer.track_running_stats = True

    @contextmanager
    def at(self, s: float, added: Iterable[tuple[nn.Parameter, Tensor]] = ()) -> Iterator[float]:
        """The model with its update at scale s.

        Run forward and backward inside. On leaving, every parameter is bit-identical to before.

        Args:
            s: The scale.
            added: What to add to weights beside it, as partners in a merge would: not scaled, and
                constants to the gradient.

        Yields:
            What to multiply a loss by before its backward pass: gradients then include the
            chain-rule factor s, for the update alone. Multiplying the loss saves a pass over most
            gradients where most of what is trained is scaled.
        """
        reshard(self._resharding)
        ours = [item.parameter for item in self.shared if item.parameter.requires_grad]
        ids = {id(parameter) for parameter in ours}
        others = [p for p in self._all if p.requires_grad and id(p) not in ids]
        most = s != 0 and _size(ours) > _size(others)  # what a factor 0 took, none brings back
        with ExitStack() as stack:
            stack.callback(self._settle)
            with torch.no_grad():
                for item in self.shared:
                    value, scaled = local(item.parameter), self._room(item, stack)
                    if item.origin is None:
                        torch.mul(value, s, out=scaled)
                    else:
                        start = item.origin()
                        start = start if start.dtype == value.dtype else scaled.copy_(start)
                        torch.lerp(start, value, s, out=scaled)
                    stack.callback(_hold(item.parameter, scaled))
                for parameter, delta in added:
                    mixed = (parameter.to(delta.dtype) + delta).to(parameter.dtype)
                    stack.callback(_hold(parameter, mixed))
            for parameter in others if most else ours:
                stack.callback(_multiplied(parameter, 1 / s if most else s))
            torch.clear_autocast_cache()
            if self._outputs is not None:
                stack.enter_context(self._outputs.at(s))
            yield s if most else 1.0

    def _room(self, item: Shared, stack: ExitStack) -> Tensor:
        """Memory for a parameter's other values until the stack is left.

        Where they lie beside the parameter's own it is kept from pass to pass: to get new memory
        from the system takes a CPU longer than to fill it, and what it gives back lies in pieces.
        """
        room = self._rooms.pop(item.name, None)
        if room is None:
            room = torch.empty_like(local(item.parameter))
        if _lies_beside(item.parameter):
            stack.callback(self._rooms.__setitem__, item.name, room)
        return room

    def _settle(self) -> None:
        reshard(self._resharding)
        torch.clear_autocast_cache()


def _size(parameters: list[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _lies_beside(parameter: Tensor) -> bool:
    """Whether a parameter takes other values by taking other memory, without a copy.

    CUDA graphs and gathered shards know a parameter by its memory: those take them in place.
    """
    return parameter.device.type == "cpu" and not is_sharded(parameter)


@torch.no_grad()
def _hold(parameter: nn.Parameter, value: Tensor) -> Callable[[], None]:
    """Give a parameter other values; returns what brings back the old ones, bit by bit."""
    if not _lies_beside(parameter):
        part = local(parameter)
        kept = part.detach().clone()
        part.copy_(value)
        return lambda: _copy(kept, part)
    own = parameter.data

    def use(data: Tensor) -> None:
        parameter.data = data  # other memory: neither a copy of the old values nor one back
        torch.autograd.graph.increment_version(parameter)  # a backward pass out of place raises

    use(value)
    return lambda: use(own)


@torch.no_grad()
def _copy(source: Tensor, target: Tensor) -> None:
    target.copy_(source)


def _multiplied(parameter: nn.Parameter, factor: float) -> Callable[[], None]:
    """Multiply the gradients that arrive from now on; returns what ends it."""
    if not is_sharded(parameter):
        # A hook on the incoming gradient leaves what .grad holds already untouched.
        handle = parameter.register_hook(lambda grad: grad * factor)  # type: ignore[no-untyped-call]
        return handle.remove  # type: ignore[no-any-return]
    # Hooks on sharded parameters do not run: what .grad holds waits aside.
    before, parameter.grad = parameter.grad, None

    def end() -> None:
        if parameter.grad is None:
            parameter.grad = before
            return
        parameter.grad.mul_(factor)
        if before is not None:
            parameter.grad.add_(before)

    return end


def _in_place(model: nn.Module, adapter: Adapter) -> Iterator[Shared]:
    """What of an adapter is scaled in place.

    LoRA's second factors, trained or not, and whole tensors that are trained beside it.
    """
    everything = dict(model.named_parameters())
    rows = {
        id(layer.trainable_tokens_delta[key]): original
        for layer in adapter.layers
        if hasattr(layer, TOKENS)
        for key, original in layer.trainable_tokens_original.items()
    }
    for name, parameter in everything.items():
        role = adapter.role(name, parameter)
        if role == "factor":
            if adapter.is_linear and adapter.is_active(name):
                yield Shared(name, parameter, None)
        elif not parameter.requires_grad:
            continue
        elif role == "tokens":
            yield Shared(name, parameter, copy_of(rows[id(parameter)]))
        elif role == "saved":
            parts = name.split(".")
            at = parts.index("modules_to_save")
            original = ".".join([*parts[:at], "original_module", *parts[at + 2 :]])
            yield Shared(name, parameter, copy_of(everything[original]))
        elif role == "bias":
            yield Shared(name, parameter, copy_of(parameter))
