"""The update being trained, and the model with that update at another scale.

Symbols: W0 origin of a parameter (the base; zero for `lora_B`); p its current value; s scale.
Inside `LiveUpdate.at(s)` every shared parameter holds W0 + s * (p - W0): no second model, no second
graph, and gradient checkpointing recomputes with the right weights as long as
the backward pass runs inside too. The map is element-wise: of a sharded parameter each process
scales its own shard.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trap2.errors import Unsupported, UserError
from trap2.naming import is_head
from trap2.protecting.wrappers import is_sharded, local, reshard
from trap2.update import PEFT_PREFIX, adapter_refusals

LORA_A = ("lora_A", "lora_embedding_A")
LORA_B = ("lora_B", "lora_embedding_B")


@dataclass(frozen=True)
class Shared:
    """One trained parameter that a merge would re-scale. `origin` None stands for zero."""

    name: str
    parameter: nn.Parameter
    origin: Tensor | None


class LiveUpdate:
    """The part of a model in training that a release would share with its base.

    For LoRA and rsLoRA that is every `lora_B` (scaling A as well would give s squared) and whole
    modules saved beside the adapter; for full fine-tuning every trained parameter, measured from
    its value now. Task heads are not part of it.

    Args:
        model: The model, before its first optimizer step.

    Raises:
        UserError: Nothing is trainable.
        Unsupported: The adapter's update is not linear in `lora_B`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        names = [name for name, _ in trained]
        if not names:
            raise UserError("the model has 0 trainable parameters; unfreeze it or add an adapter")
        _check_adapters(model)
        if any(part in name.split(".") for name in names for part in LORA_B):
            self.shared = list(_adapter_parameters(model, trained))
        else:
            self.shared = [
                Shared(name, p, local(p).detach().clone())
                for name, p in trained
                if not is_head(_inner(name))
            ]
        if not self.shared:
            raise UserError(
                f"only head parameters are trainable ({', '.join(names[:3])}); nothing would be "
                "shared with the base, so there is nothing to protect: unfreeze the encoder"
            )

    @property
    def device(self) -> torch.device:
        """Where the update lies."""
        return self.shared[0].parameter.device

    @contextmanager
    def at(self, s: float) -> Iterator[float]:
        """The model with its update at scale s.

        Run forward and backward inside. On leaving, every parameter is bit-identical to before.

        Yields:
            What to multiply a loss by before its backward pass: gradients then include the
            chain-rule factor s, for the update alone. Multiplying the loss saves a pass over most
            gradients where most of what is trained is scaled.
        """
        reshard(self.model)
        ours = [item.parameter for item in self.shared if item.parameter.requires_grad]
        ids = {id(parameter) for parameter in ours}
        others = [p for p in self.model.parameters() if p.requires_grad and id(p) not in ids]
        most = s != 0 and _size(ours) > _size(others)  # what a factor 0 took, none brings back
        with ExitStack() as stack:
            stack.callback(self._settle)
            with torch.no_grad():
                for item in self.shared:
                    value = local(item.parameter)
                    scaled = value * s if item.origin is None else item.origin.lerp(value, s)
                    stack.callback(_hold(item.parameter, scaled))
            for parameter in others if most else ours:
                stack.callback(_multiplied(parameter, 1 / s if most else s))
            torch.clear_autocast_cache()
            yield s if most else 1.0

    def _settle(self) -> None:
        reshard(self.model)
        torch.clear_autocast_cache()


def _size(parameters: list[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


@torch.no_grad()
def _hold(parameter: nn.Parameter, value: Tensor) -> Callable[[], None]:
    """Give a parameter other values; returns what brings back the old ones, bit by bit."""
    if is_sharded(parameter) or parameter.device.type != "cpu":
        # In place: CUDA graphs and gathered shards know a parameter by its memory.
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


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Batch-norm layers normalise as before but leave their running statistics alone."""
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


def _inner(name: str) -> str:
    """A parameter's name inside the model an adapter wraps."""
    return name.split(PEFT_PREFIX, 1)[-1]


def _adapter_parameters(
    model: nn.Module, trained: list[tuple[str, nn.Parameter]]
) -> Iterator[Shared]:
    everything = dict(model.named_parameters())
    for name, parameter in trained:
        parts = name.split(".")
        if any(part in parts for part in LORA_B):
            yield Shared(name, parameter, None)
        elif any(part in parts for part in LORA_A) or is_head(_inner(name)):
            continue
        elif "modules_to_save" in parts:
            at = parts.index("modules_to_save")
            original = ".".join([*parts[:at], "original_module", *parts[at + 2 :]])
            yield Shared(name, parameter, local(everything[original]).detach().clone())
        else:
            raise Unsupported(
                f"'{name}' is trained beside a LoRA adapter and is neither part of it nor of a "
                "task head; freeze it, or list its module in modules_to_save"
            )


def _check_adapters(model: nn.Module) -> None:
    for module in model.modules():
        for config in (getattr(module, "peft_config", None) or {}).values():
            reasons = adapter_refusals(config.to_dict())
            if reasons:
                raise Unsupported(
                    f"this adapter uses {'; '.join(reasons)}: its scale is not exact yet; "
                    "use plain LoRA, rsLoRA or full fine-tuning"
                )
