"""Every process trains the trap at the same scales: here they compare what they are about to draw.

Scales depend on (seed, step) alone, so no process has to tell another. But a process with another
setting, or resumed from another step, would go unnoticed: the weights stay equal, since gradients
are averaged, and are wrong.
"""

import hashlib

import torch
from torch import distributed as dist

from trap2.errors import TrainingStopped
from trap2.protecting.config import Trap2Config
from trap2.protecting.wrappers import processes

EVERY = 100
"""Backward calls from one comparison to the next; the first call is compared too."""


class Agreement:
    """Counts calls, and compares settings and scales over all processes every so often."""

    def __init__(self, config: Trap2Config) -> None:
        self._config, self._calls = config, 0

    def check(self, step: int, device: torch.device) -> None:
        """Compare, if it is time to. Every process must call this equally often.

        Args:
            step: Index of the optimizer step.
            device: Where the process group's tensors live.

        Raises:
            TrainingStopped: The processes disagree; raised in all of them.
        """
        if processes() == 1 or self._config.strength == 0:
            return
        self._calls += 1
        if (self._calls - 1) % EVERY:
            return
        config = self._config
        scales = config.law_at(step).draw(config.scale_seed, step, config.scales_per_step)
        digest = hashlib.sha256(f"{config} {step} {scales}".encode()).digest()
        own = torch.tensor([int.from_bytes(digest[:7], "big")], device=device)
        found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(found, own)
        others = [rank for rank, value in enumerate(found) if not torch.equal(value, found[0])]
        if others:
            raise TrainingStopped(
                f"processes {others} are not at the step, scales and settings of process 0 (here: "
                f"step {step}, scales {scales}); training stopped before the weights took it: give "
                "every process the same Trap2Config and resume them from the same checkpoint"
            )
