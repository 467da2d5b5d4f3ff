"""One live model that takes on one merge after another, in place, and goes back exactly.

Symbols: W0 base tensor; dW merged update. Inside `with live.merged(deltas):` the model computes
with `W0 + dW`; afterwards every touched tensor holds the very bits it held before. Nothing is
copied but the touched tensors, and parameters stay the same objects.

Tools that drop a tensor without a word make a merge look broken and the protection look good, so
whatever does not fit is an error here.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trap2.attacks.vectors import Tensors
from trap2.checkpoint import Checkpoint
from trap2.errors import Trap2Error, UserError
from trap2.naming import align, is_head
from trap2.registry import did_you_mean


class LiveModel:
    """A model holding its base weights, on which merges are tried.

    Args:
        model: The model, with the base weights loaded (its task head is its own).
        base: The base checkpoint, or a mapping of base tensor names to tensors. Without it the
            model's present state is the base, under the model's own names.

    Raises:
        UserError: The model shares no tensor with the base, or holds other weights or shapes.
    """

    def __init__(
        self, model: nn.Module, base: Checkpoint | Mapping[str, Tensor] | None = None
    ) -> None:
        self.model = model
        self._base = None if base is None else Tensors.of_base(base)
        own = model.state_dict()
        names = own if self._base is None else [n for n in self._base if not is_head(n)]
        aligned = align(names, own)
        self._names = {n: to for n, to in aligned.items() if own[to].is_floating_point()}
        self._busy = False
        if not self._names:
            raise UserError("the model shares no tensor with the base; give the base's own model")
        if self._base is not None:
            for name, to in self._names.items():
                _check_same(name, own[to], self._base[name])

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the base tensors that a merge may change in this model."""
        return tuple(self._names)

    @property
    def own_names(self) -> Mapping[str, str]:
        """What the model calls each base tensor that a merge may change."""
        return self._names

    @contextmanager
    def merged(
        self, deltas: Iterable[tuple[str, Tensor]], *, expected: Iterable[str] = ()
    ) -> Iterator[nn.Module]:
        """Hold W0 + dW for the given tensors inside the `with` block.

        The sum is taken in float32 (float64 where the model is) and then cast to the model's type.
        Outside the block, also after an exception, every touched tensor is bit-identical to before.

        Args:
            deltas: (base tensor name, merged update) pairs, as `merge` yields them.
            expected: Names that must be among them, where they do not come from `merge`, which
                checks this itself.

        Yields:
            The model.

        Raises:
            UserError: A name or shape does not fit the model, a name comes twice, two names of one
                tied tensor disagree, or expected tensors are missing.
            Trap2Error: A merge is applied already.
        """
        if self._busy:
            raise Trap2Error(
                "this model holds a merge already; leave its `with` block before the next one"
            )
        self._busy = True
        kept: dict[int, tuple[Tensor, Tensor]] = {}
        try:
            self._apply(deltas, dict.fromkeys(expected), kept)
            yield self.model
        finally:
            with torch.no_grad():
                for target, before in kept.values():
                    target.copy_(before)
            torch.clear_autocast_cache()
            self._busy = False

    @torch.no_grad()
    def _apply(
        self,
        deltas: Iterable[tuple[str, Tensor]],
        expected: dict[str, None],
        kept: dict[int, tuple[Tensor, Tensor]],
    ) -> None:
        """Put each update in place; `kept` takes (tensor, its copy) for everything touched.

        Autocast keeps low-precision copies of weights it has seen, so they are thrown away.
        """
        state = self.model.state_dict(keep_vars=True)
        seen: dict[str, None] = {}
        for name, delta in deltas:
            if name in seen:
                raise UserError(f"the merge gives '{name}' twice; give every tensor once")
            seen[name] = None
            target = self._target(name, delta, state)
            place = target.data_ptr() or id(target)
            tied = place in kept
            before = kept.setdefault(place, (target, target.detach().clone()))[1]
            value = self._sum(name, before, delta)
            if tied and not torch.equal(value, target):
                raise UserError(
                    f"'{name}' is tied to another tensor that the merge changes differently; "
                    "give both the same update, or only one of them"
                )
            target.copy_(value)
        missing = [name for name in expected if name not in seen]
        if missing:
            raise UserError(
                f"the merge lacks {len(missing)} of {len(expected)} expected tensors, such as "
                f"'{missing[0]}'; the rest would silently stay at the base, so give all of them"
            )
        torch.clear_autocast_cache()

    def _target(self, name: str, delta: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """The model's tensor that one update belongs to."""
        if name not in self._names:
            close = did_you_mean(name, list(self._names))
            raise UserError(
                f"the merge changes '{name}', which is no floating-point base tensor of the model;"
                f"{close} use the model of this base"
            )
        target = state[self._names[name]]
        if delta.shape != target.shape:
            raise UserError(
                f"the update of '{name}' has shape {tuple(delta.shape)}, but the model has "
                f"{tuple(target.shape)}; use updates of this base"
            )
        return target

    def _sum(self, name: str, before: Tensor, delta: Tensor) -> Tensor:
        """W0 + dW in the model's type, worked out in at least float32."""
        base = before if self._base is None else self._base[name].to(before.device)
        wide = torch.promote_types(before.dtype, torch.float32)
        return (base.to(wide) + delta.to(before.device, wide)).to(before.dtype)


def _check_same(name: str, own: Tensor, base: Tensor) -> None:
    """Whether the model holds a base tensor; what it does not touch would be wrong otherwise."""
    if own.shape != base.shape:
        raise UserError(
            f"'{name}' has shape {tuple(own.shape)} in the model, but {tuple(base.shape)} in the "
            "base; give the model of this base"
        )
    if not torch.equal(own, base.to(own.device, own.dtype)):
        raise UserError(
            f"'{name}' of the model differs from the base; load the base weights before merging"
        )
