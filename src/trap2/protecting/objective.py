"""What the scaled pass minimises: the chosen trap loss plus the weighted read-out adversary."""

import torch
from torch import Tensor

from trap2.errors import UserError
from trap2.protecting.config import Trap2Config
from trap2.protecting.losses import TRAP_LOSSES, Outcome
from trap2.protecting.memory import RowMemory


class TrapObjective:
    """The trap of one run; it keeps what the read-out adversary remembers.

    Args:
        config: Settings of the trap.
    """

    def __init__(self, config: Trap2Config) -> None:
        self.config = config
        self.memory = RowMemory(config.memory)

    def __call__(self, outcome: Outcome, s: float) -> Tensor:
        """The trap loss of one pass at scale s, a scalar.

        Raises:
            UserError: The trap needs class or token probabilities and the model gives none.
        """
        value = TRAP_LOSSES.get(self.config.loss)(outcome)
        if self.config.readout_weight > 0:
            value = value + self.config.readout_weight * self.memory.readout(outcome, s)
        return value

    @property
    def reads_the_loss_alone(self) -> bool:
        """Whether it needs no logits and labels: any trainer can then be protected."""
        try:
            self(Outcome(torch.zeros(())), 1.0)
        except UserError:
            return False
        return True
