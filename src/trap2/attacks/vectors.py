"""Updates as the attacks take them: named tensors, read when asked for, and what is known of them.

Symbols: dW_i update of model i (`W_i - W0`, float32).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import TypeVar

import torch
from torch import Tensor

from trap2.checkpoint import Checkpoint
from trap2.errors import UserError
from trap2.update import Update

T = TypeVar("T")

_SERIALS = count()


class Tensors(Mapping[str, Tensor]):
    """Named tensors, each read when it is asked for.

    Args:
        names: Their names, in a fixed order.
        read: Reads one of them.
    """

    def __init__(self, names: Iterable[str], read: Callable[[str], Tensor]) -> None:
        self._names, self._read = dict.fromkeys(names), read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def on(self, device: torch.device) -> "Tensors":
        """The same, each put on a device as it is read."""
        return Tensors(self, lambda name: self[name].to(device))

    @staticmethod
    def of_base(base: Checkpoint | Mapping[str, Tensor]) -> "Tensors":
        """See a checkpoint, or any mapping of names to tensors, as `Tensors`."""
        if isinstance(base, Checkpoint):
            return Tensors(base.names, base.tensor)
        return Tensors(base, base.__getitem__)


class TaskVector(Tensors):
    """One model's update dW by base tensor name, in float32.

    Keep one per update and pass it to every `merge`: what it has worked out once it remembers.

    Attributes:
        serial: A number no other task vector of this process has, so that what is worked out
            from several of them can be remembered by their numbers.
        update: The release that it is the update of, as it was released; None if it is of none.
    """

    def __init__(
        self, names: Iterable[str], read: Callable[[str], Tensor], update: Update | None = None
    ) -> None:
        super().__init__(names, lambda name: read(name).float())
        self.serial, self.update = next(_SERIALS), update
        self._memory: dict[tuple[object, ...], tuple[tuple[object, ...], object]] = {}

    @classmethod
    def of(cls, update: Update | Mapping[str, Tensor]) -> "TaskVector":
        """See an update, or any mapping of base tensor names to deltas, as a task vector."""
        if isinstance(update, TaskVector):
            return update
        if isinstance(update, Update):
            return cls(update.shared, update.delta, update)
        return cls(update, update.__getitem__)

    def on(self, device: torch.device) -> "TaskVector":
        """The same, each tensor put on a device as it is read: merges are worked out there."""
        return TaskVector(self, lambda name: self[name].to(device), self.update)

    def held(self) -> "TaskVector":
        """The same with all tensors in memory."""
        return TaskVector(self, dict(self).__getitem__, self.update)

    def remember(
        self, key: tuple[object, ...], work: Callable[[], T], version: tuple[object, ...] = ()
    ) -> T:
        """The result of `work`, done once for a key and as long as its version stays the same.

        Args:
            key: What the result is and depends on; it opens with the name of the kind of result.
            work: Works it out.
            version: What else it depends on. Of one key only the latest version is kept, for
                results as large as the update itself.
        """
        held = self._memory.get(key)
        if held is None or held[0] != version:
            held = self._memory[key] = (version, work())
        return held[1]  # type: ignore[return-value]

    def magnitude(self, share: float) -> float:
        """The smallest magnitude among the largest `share` of all entries of the whole update.

        It is the exact k-th largest value, k = round(share * entries) but at least 1, and no more
        than a tensor is in memory. As integers, the bits of magnitudes are in the same order: their
        upper half is counted first, and what agrees in that with the value looked for is sorted.

        Args:
            share: Share of the entries, 0 < share <= 1.
        """

        def select() -> float:
            counts = torch.zeros(UPPER, dtype=torch.int64)
            for name in self:
                counts += torch.bincount(_bits(self[name]) >> LOWER, minlength=UPPER)
            from_here_up = counts.flip(0).cumsum(0).flip(0)
            kept = max(1, round(share * int(counts.sum())))
            upper = int((from_here_up >= kept).nonzero()[-1])
            alike = (entries[entries >> LOWER == upper] for entries in map(_bits, self.values()))
            close = torch.cat([*alike])
            rank = int(from_here_up[upper]) - kept + 1
            return float(torch.kthvalue(close, rank).values.view(torch.float32))

        return self.remember(("magnitude", share), select)


LOWER = 16
UPPER = 2 ** (31 - LOWER)
"""Of the 31 bits of a magnitude the lower ones, and how many numbers the upper ones can be."""


def _bits(delta: Tensor) -> Tensor:
    return delta.abs().flatten().view(torch.int32).cpu()


def by_tensor(updates: Sequence[TaskVector]) -> Iterator[tuple[str, list[Tensor]]]:
    """Walk all tensors that any update has, in order of first appearance.

    Yields:
        (name, [dW_1, dW_2, ...]); an update without that tensor counts as zero there.

    Raises:
        UserError: Two updates give one tensor different shapes.
    """
    for name in dict.fromkeys(name for update in updates for name in update):
        found = [update.get(name) for update in updates]
        first, *others = (delta for delta in found if delta is not None)
        for other in others:
            if other.shape != first.shape:
                raise UserError(
                    f"'{name}' has shape {tuple(first.shape)} in one update and "
                    f"{tuple(other.shape)} in another; only updates of one base can be merged"
                )
        zero = first.new_zeros(()).expand(first.shape)
        yield name, [zero if delta is None else delta for delta in found]


def weighted_sum(deltas: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    """`sum_i f_i dW_i`.

    Args:
        deltas: One tensor per model, at least one.
        factors: One factor f_i per model.
    """
    total = torch.zeros_like(deltas[0])
    for factor, delta in zip(factors, deltas, strict=True):
        total = total.add_(delta, alpha=factor)
    return total
