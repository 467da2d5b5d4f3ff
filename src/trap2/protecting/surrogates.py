"""Surrogate partners: the trap is trained on merges, not only on scales of the update alone.

Symbols: W0 base; dW update in training; dW_j a surrogate's; s, c_j scales. A share of the trap
passes runs at

    W0 + s * dW + sum_j c_j * dW_j,    s in [.6, 1.2], one to three j, c_j in [.2, 1].

At s = 1 this is the release used in a merge at its own scale, where no trap without partners may
be. Few fine-tunes become many partners: a partner beyond the bank's own is one of them with its
sign flipped, with its tensors moved to other layers, or a mixture of two of equal size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trap2.checkpoint import Checkpoint
from trap2.errors import Unsupported, UserError
from trap2.files import read_json, weights_digest
from trap2.naming import align
from trap2.protecting.config import Trap2Config
from trap2.protecting.scaled import LiveUpdate
from trap2.protecting.tuners import base_name
from trap2.protecting.wrappers import is_sharded
from trap2.scales import generator
from trap2.tasks.model import base_folder
from trap2.update import Factors, Update

SCALES = (0.6, 1.2)
COEFFICIENTS = (0.2, 1.0)
MOST_AT_ONCE = 3
APART = 100.0
TRANSFORMS = ("flipped", "moved", "mixed")


@dataclass(frozen=True)
class Mix:
    """Where one trap pass runs: the update's scale, and which partners stand beside it.

    Attributes:
        s: Scale of the update in training.
        partners: (partner, coefficient) of each.
    """

    s: float
    partners: tuple[tuple[int, float], ...] = ()

    @property
    def place(self) -> float:
        """The scale, far from all others in a merge: no read-out is fitted on outputs of both."""
        return self.s + APART * bool(self.partners)


@dataclass(frozen=True)
class Part:
    """A surrogate as a partner uses it: its weight, and whose place each of its tensors takes."""

    weight: float
    surrogate: int
    moved: dict[str, str]


class Surrogates:
    """Partners from a bank, for one model in training.

    Args:
        config: Settings of the trap; its `surrogates` is the bank's folder.
        update: The update in training, on the base that the bank was made for.

    Attributes:
        tasks: Names of the tasks that the bank was trained on.
        partners: Of each partner the surrogates it is made of.

    Raises:
        UserError: The folder is no bank, was changed, or is of another base.
        Unsupported: The update is not a sum on top of the base's own weights.
    """

    def __init__(self, config: Trap2Config, update: LiveUpdate) -> None:
        self.config = config
        folder = Path(config.surrogates)
        record = read_json(folder / "bank.json") if folder.is_dir() else None
        if record is None or not record.get("surrogates"):
            raise UserError(f"surrogates={folder} is no bank; make one with `trap2 surrogates`")
        base = Checkpoint(base_folder(record["base"]))
        self.tasks = [*dict.fromkeys(entry["task"] for entry in record["surrogates"])]
        self._held = [_read(folder, entry, base) for entry in record["surrogates"]]
        self._targets = _targets(self._held, update, base)
        self.partners = list(_partners(self._held, config.surrogate_count or len(self._held)))

    @classmethod
    def of(cls, config: Trap2Config, update: LiveUpdate) -> "Surrogates | None":
        """The partners that a setting asks for, if it does."""
        return cls(config, update) if config.surrogates and config.strength > 0 else None

    def mix(self, step: int, part: int, s: float) -> Mix:
        """Where one trap pass runs, drawn from (seed, step, part): alone at s, or in a merge."""
        drawn = generator(f"trap2 surrogates {self.config.scale_seed} {step} {part}")
        first, second, third = torch.rand(3, generator=drawn, dtype=torch.float64).tolist()
        if first >= self.config.surrogate_share:
            return Mix(s)
        count = 1 + int(third * min(MOST_AT_ONCE, len(self.partners)))
        which = torch.randperm(len(self.partners), generator=drawn)[:count].tolist()
        places = torch.rand(count, generator=drawn, dtype=torch.float64).tolist()
        coefficients = [_between(COEFFICIENTS, place) for place in places]
        return Mix(_between(SCALES, second), tuple(zip(which, coefficients, strict=True)))

    def added(self, mix: Mix) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """What its partners add to the weights: (parameter, sum_j c_j * dW_j), one at a time."""
        for name, parameter in self._targets.items():
            wide = torch.promote_types(parameter.dtype, torch.float32)
            total: Tensor | None = None
            for partner, coefficient in mix.partners:
                for item in self.partners[partner]:
                    delta = self._delta(item, name)
                    if delta is None:
                        continue
                    if total is None:
                        total = torch.zeros(delta.shape, dtype=wide)
                    total.add_(delta.to(wide), alpha=coefficient * item.weight)
            if total is not None:
                yield parameter, total.to(parameter.device)

    def _delta(self, item: Part, name: str) -> Tensor | None:
        found = self._held[item.surrogate].get(item.moved.get(name, name))
        return found.delta() if isinstance(found, Factors) else found


Held = dict[str, Factors | Tensor]
"""A surrogate in memory: the factors of its tensors, or tensors where it has none."""


def _read(folder: Path, entry: dict[str, Any], base: Checkpoint) -> Held:
    inside = folder / str(entry["name"])
    update = Update.open(inside, base.folder)
    if weights_digest(inside) != entry["digest"]:
        raise UserError(
            f"the weights in {inside} are not those that {folder}/bank.json names; make the bank "
            "again"
        )
    return {name: update.factors(name) or update.delta(name) for name in update.shared}


def _targets(held: Sequence[Held], update: LiveUpdate, base: Checkpoint) -> dict[str, nn.Parameter]:
    """The parameter of each base tensor that a surrogate changes; it holds the base's values."""
    if not update.is_sum:
        raise Unsupported(
            "surrogates are exact beside LoRA, rsLoRA and full fine-tuning, whose update is a sum "
            "on top of the base; use one of them, or leave surrogates out"
        )
    named = ((base_name(n), p) for n, p in update.model.named_parameters())
    live = {name: parameter for name, parameter in named if name is not None}
    aligned = align(base.names, live)
    found = {}
    for name in dict.fromkeys(name for one in held for name in one):
        parameter = live.get(aligned.get(name, ""))
        if parameter is not None and (is_sharded(parameter) or not parameter.is_floating_point()):
            raise Unsupported(
                f"surrogates are added to '{name}', which is quantised or sharded over processes; "
                "train on whole floating-point weights, or leave surrogates out"
            )
        if parameter is None or not _holds(parameter, base.tensor(name)):
            raise UserError(
                f"the bank was made for another base than the model's: '{name}' of {base.folder} "
                "differs or is missing there; make the bank for this base"
            )
        found[name] = parameter
    return found


def _holds(parameter: nn.Parameter, value: Tensor) -> bool:
    own = parameter.detach()
    return own.shape == value.shape and torch.equal(own, value.to(own.device, own.dtype))


def _partners(held: Sequence[Held], count: int) -> Iterator[tuple[Part, ...]]:
    """The bank's own updates, then transforms of them."""
    for place in range(count):
        first = place % len(held)
        if place < len(held):
            yield (Part(1.0, first, {}),)
            continue
        drawn = generator(f"trap2 partner {place}")
        transform = TRANSFORMS[(place - len(held)) % len(TRANSFORMS)]
        first, second = torch.randint(len(held), (2,), generator=drawn).tolist()
        if transform == "flipped":
            yield (Part(-1.0, first, {}),)
        elif transform == "moved":
            yield (Part(1.0, first, _moved(held[first], drawn)),)
        else:
            angle = _between((0.2, 0.8), float(torch.rand((), generator=drawn)))
            other = (first + 1 + second % max(1, len(held) - 1)) % len(held)
            yield Part(angle**0.5, first, {}), Part((1 - angle) ** 0.5, other, {})


def _moved(one: Held, drawn: torch.Generator) -> dict[str, str]:
    """Tensors of one shape change places."""
    shapes: dict[tuple[int, ...], list[str]] = {}
    for name, found in one.items():
        tensors = (found.A, found.B) if isinstance(found, Factors) else (found,)
        shapes.setdefault(tuple(n for t in tensors for n in t.shape), []).append(name)
    return {
        name: names[place]
        for names in shapes.values()
        for name, place in zip(
            names, torch.randperm(len(names), generator=drawn).tolist(), strict=True
        )
    }


def _between(ends: tuple[float, float], place: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * place
