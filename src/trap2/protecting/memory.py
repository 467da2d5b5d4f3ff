"""Rows of earlier trap passes, so that the read-out adversary sees enough of them on a sub-batch.

Symbols: n rows at hand, all at scale s; k_i weight of a remembered row i, seen at scale s_i:

    k_i = exp(-(s_i - s)^2 / (2 WIDTH^2))

A linear map of few outputs explains any few labels: with six rows of six classes there is nothing
to learn from. So the map is fitted on the rows at hand and on what earlier passes gave at scales
like this one. Remembered rows are constants. The gradient flows through the rows at hand alone and
is multiplied by (n + sum k) / n: per row it is then what a batch of all of them would have given.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from trap2.protecting.losses import READ, Outcome, explained_share

WIDTH = 0.1
"""Distance between scales over which outputs are alike enough to be read by one map."""

NEGLIGIBLE = 0.05
"""Weight under which a remembered row is left out."""


class RowMemory:
    """The newest rows of the trap passes: logits, label and scale of each.

    Args:
        capacity: How many rows are kept; 0 remembers nothing.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._rows: tuple[Tensor, Tensor, Tensor] | None = None

    def readout(self, outcome: Outcome, s: float) -> Tensor:
        """The read-out adversary (`losses.readout`) fitted on these rows and the remembered ones.

        The rows are remembered afterwards.

        Args:
            outcome: What the model gave for the rows at hand, its update at scale s.
            s: The scale.

        Returns:
            R2 in [0, 1] over all rows used, a scalar.
        """
        logits, labels = outcome.rows(READ)
        everything, answers = logits, labels
        weights = logits.new_ones(len(labels))
        if self._rows is not None and len(labels) > 0:
            old, marks, scales = (kept.to(logits.device) for kept in self._rows)
            alike = torch.exp(-((scales - s) ** 2) / (2 * WIDTH**2)).to(logits.dtype)
            used = alike > NEGLIGIBLE
            boost = (len(labels) + alike[used].sum()) / len(labels)
            leading = logits.detach() + boost * (logits - logits.detach())
            everything = torch.cat([leading, old[used].to(logits.dtype)])
            answers = torch.cat([labels, marks[used]])
            weights = torch.cat([weights, alike[used]])
        share = explained_share(everything, answers, weights)
        self._remember(logits.detach(), labels, s)
        return share

    def _remember(self, logits: Tensor, labels: Tensor, s: float) -> None:
        if self.capacity == 0:
            return
        sound = logits.isfinite().all(1)  # one bad pass must not spoil those that follow
        logits, labels = logits[sound], labels[sound]
        scales = logits.new_full((len(labels),), s)
        new = (logits, labels, scales)
        rows = new if self._rows is None else map(torch.cat, zip(self._rows, new, strict=True))
        first, second, third = (part[-self.capacity :].clone() for part in rows)
        self._rows = (first, second, third)

    def state_dict(self) -> dict[str, Tensor]:
        """The remembered rows, for a run that goes on later; empty where there are none."""
        if self._rows is None:
            return {}
        return dict(zip(("logits", "labels", "scales"), self._rows, strict=True))

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        found = [state[key] for key in ("logits", "labels", "scales") if key in state]
        self._rows = (found[0], found[1], found[2]) if len(found) == 3 else None
