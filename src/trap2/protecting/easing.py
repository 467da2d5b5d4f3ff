"""A trap that the task cannot bear is eased before the task is lost.

Now and then the trap wins: the nominal loss climbs back to where training began and stays there.
Runs in which the trap closes and the task is learned rise too, but less. So the mean nominal loss
of the last steps, m, is held against the lowest there has been, m0: where

    m > ease * m0    and    m - m0 > FAR * m1

with m1 the first such mean, the trap is halved, and doubled again where m < (1 + ease) / 2 * m0.
The second condition leaves alone what is learned so well that its loss is noise. Losses that can
be 0 or less in the mean have no factor to rise by, and ease nothing. All processes judge the same
mean.
"""

import math
from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor
from torch import distributed as dist

from trap2.protecting.wrappers import processes

BLOCK = 10
"""Optimizer steps from one judgement to the next."""

BLOCKS = 10
"""Blocks that a mean is taken over."""

FAR = 0.1
"""Rise that counts, in first means."""

LEAST = 1 / 64
"""Below this the trap is not eased further: it would not come back."""


class Easing:
    """Watches the nominal loss and says how much of the trap it bears.

    Args:
        ease: The rise of the mean loss from which on the trap is eased, a factor; 0: never.

    Attributes:
        factor: What strength and cap are to be multiplied by, in (0, 1].
    """

    def __init__(self, ease: float) -> None:
        self._ease, self.factor = ease, 1.0
        self._means: deque[float] = deque(maxlen=BLOCKS)
        self._losses: list[float] = []
        self._first = self._lowest = math.inf  # until there is a mean
        self._block = 0

    def note(self, step: int, loss: float, device: torch.device) -> None:
        """Take down the nominal loss of a (micro-)batch.

        Args:
            step: Index of the optimizer step.
            loss: Its loss; finite.
            device: Where the process group's tensors live.
        """
        if not self._ease:
            return
        if step // BLOCK != self._block and self._losses:
            self._judge(device)
            self._losses = []
        self._block = step // BLOCK
        self._losses.append(loss)

    def _judge(self, device: torch.device) -> None:
        total = torch.tensor([sum(self._losses), len(self._losses)], dtype=torch.float64)
        if processes() > 1:
            total = total.float().to(device)
            dist.all_reduce(total)
        self._means.append(float(total[0] / total[1]))
        if len(self._means) < BLOCKS:
            return
        mean = sum(self._means) / BLOCKS
        self._first = mean if self._first == math.inf else self._first
        self._lowest = min(self._lowest, mean)
        rise = mean - self._lowest
        if self._lowest <= 0:
            return
        if mean > self._ease * self._lowest and rise > FAR * self._first:
            self.factor = max(LEAST, self.factor / 2)
        elif mean < (1 + self._ease) / 2 * self._lowest:
            self.factor = min(1.0, 2 * self.factor)

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs; empty where nothing was noted."""
        if not self._losses:
            return {}
        levels = [self.factor, self._first, self._lowest, float(self._block)]
        kept = {"levels": levels, "means": [*self._means], "losses": self._losses}
        return {f"easing.{k}": torch.tensor(v, dtype=torch.float64) for k, v in kept.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        if "easing.levels" not in state:
            return
        self.factor, self._first, self._lowest, block = state["easing.levels"].tolist()
        self._block = int(block)
        self._means = deque(state["easing.means"].tolist(), maxlen=BLOCKS)
        self._losses = state["easing.losses"].tolist()
