"""Memory for the scaled values of parameters on a CPU: filled in a trap pass, given back after it.

Of a whole model it is as much as its weights. Got in small pages, as it comes by itself, it takes a
CPU several times as long as filling it; so it is one region of huge pages where the system has
them, whose addresses are kept and whose pages are not.
"""

import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate

import torch
from torch import Tensor

LINE = 64
"""Bytes that a tensor's memory is aligned to."""

PAGE = 2**21
"""Bytes of a huge page; less than that comes by itself."""


class Rooms:
    """Memory in the shapes, strides and precisions of tensors, not with their values.

    Args:
        tensors: On a CPU.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._like = [torch.empty_like(tensor, device="meta") for tensor in tensors]
        self._ends = [*accumulate(-(-like.nbytes // LINE) * LINE for like in self._like)]
        self._region: mmap.mmap | None = None
        if self._ends and self._ends[-1] >= PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
            self._region = mmap.mmap(-1, self._ends[-1], flags=mmap.MAP_PRIVATE | mmap.MAP_ANON)
            with suppress(OSError):  # a system without them
                self._region.madvise(mmap.MADV_HUGEPAGE)
        self._taken = False

    @contextmanager
    def open(self) -> Iterator[list[Tensor]]:
        """A tensor for each; nothing may read them once the context is left."""
        region = None if self._taken else self._region  # a scale inside another has its own
        if region is None:
            yield [torch.empty_like(like, device="cpu") for like in self._like]
            return
        self._taken = True
        try:
            yield self._views(region)
        finally:
            self._taken = False
            region.madvise(mmap.MADV_DONTNEED)

    def _views(self, region: mmap.mmap) -> list[Tensor]:
        raw = torch.frombuffer(region, dtype=torch.uint8)
        return [
            raw[start : start + like.nbytes].view(like.dtype).as_strided(like.shape, like.stride())
            for start, like in zip([0, *self._ends], self._like, strict=False)
        ]
