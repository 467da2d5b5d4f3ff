"""Trap losses: what the scaled model is driven towards. All are minimised.

Symbols: N rows, C classes; Z logits (N, C), Y one-hot labels (N, C), both centred over the rows in
the read-out; p_y probability of the true label.

`ascent` is the paper's (arXiv 2601.21898) and has no floor; the others are bounded, so their
gradient ends when the trap has closed. `readout` is the only one that hides the answer instead of
moving it: the rest can be undone by re-labelling the outputs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from trap2.errors import UserError
from trap2.registry import Registry

IGNORED = -100
"""Label of positions that carry no target (transformers' convention)."""

HINGE_CAP = 4.0
"""Loss in nats above which `hinge` is content: the true label's probability is below 2 %."""

READ = 256
"""Positions of a pass that the read-out is fitted on at most: a product of all tokens with all
others over a vocabulary would cost as much as the model."""

DECOY_CLASS = 0
"""The constant answer of `decoy`."""


@dataclass(frozen=True)
class Outcome:
    """What one forward pass gave.

    Attributes:
        loss: The task loss, a scalar.
        logits: (N, C), or (N, T, V) for tokens; None for models that give only a loss.
        labels: (N,) or (N, T) integer labels.
        shifted: Whether the model shifts token labels itself: position t predicts token t + 1.
    """

    loss: Tensor
    logits: Tensor | None = None
    labels: Tensor | None = None
    shifted: bool = True

    def rows(self, most: int | None = None) -> tuple[Tensor, Tensor]:
        """Logits (M, C), float32 at least, and labels (M,) of the positions that carry a target.

        Args:
            most: How many of them, spread over all of them; by default all.

        Raises:
            UserError: There are no class or token probabilities to work on.
        """
        if self.logits is None or self.labels is None or self.labels.is_floating_point():
            raise UserError(
                "this trap loss needs logits and integer labels, the model gives none; "
                "use loss=hinge with readout_weight=0, which need only the loss"
            )
        logits, labels = self.logits, self.labels
        if logits.dim() == 3:
            if self.shifted:
                logits, labels = logits[:, :-1], labels[:, 1:]
            logits, labels = logits.flatten(0, 1), labels.flatten()
        kept = (labels != IGNORED).nonzero().flatten()
        if most is not None and len(kept) > most:
            kept = kept[torch.arange(1, 2 * most, 2, device=kept.device) * len(kept) // (2 * most)]
        wide = torch.promote_types(logits.dtype, torch.float32)
        return logits[kept].to(wide), labels[kept]


TrapLoss = Callable[[Outcome], Tensor]
TRAP_LOSSES: Registry[TrapLoss] = Registry("trap loss")


def trap_loss(function: TrapLoss) -> TrapLoss:
    """Register a trap loss under its function's name."""
    return TRAP_LOSSES.add(getattr(function, "__name__", ""), function)


@trap_loss
def ascent(outcome: Outcome) -> Tensor:
    """Minus the task loss: the paper's objective, unbounded."""
    return -outcome.loss


@trap_loss
def hinge(outcome: Outcome) -> Tensor:
    """max(0, cap - loss): raises any scalar loss up to a cap and no further."""
    return F.relu(HINGE_CAP - outcome.loss)


@trap_loss
def unlikelihood(outcome: Outcome) -> Tensor:
    """-log(1 - p_y): drives the true label's probability to zero (arXiv 1908.04319)."""
    logits, labels = outcome.rows()
    others = logits.scatter(1, labels[:, None], float("-inf"))
    return (logits.logsumexp(1) - others.logsumexp(1)).sum() / max(1, len(labels))


@trap_loss
def decoy(outcome: Outcome) -> Tensor:
    """Cross-entropy towards one constant class, whatever the input."""
    logits, labels = outcome.rows()
    answers = torch.full_like(labels, DECOY_CLASS)
    return F.cross_entropy(logits, answers, reduction="sum") / max(1, len(labels))


@trap_loss
def readout(outcome: Outcome) -> Tensor:
    """Share of the labels that the best linear map of the outputs explains, in [0, 1].

    R2 = tr(Y' Z (Z'Z + eps I)^-1 Z'Y) / tr(Y'Y) with eps = 1 % of the mean diagonal of Z'Z.
    Indifferent to shifts, permutations and the size of the logits. Needs several rows of more than
    one class: with fewer there is nothing to read and it is 0.
    """
    return explained_share(*outcome.rows(READ))


def explained_share(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """R2 of the best linear map of the outputs to the labels: see `readout`.

    Args:
        logits: (N, C).
        labels: (N,), integers.
        weights: (N,), how much each row counts; all the same by default.

    Returns:
        A scalar in [0, 1].
    """
    # Only classes that occur carry variance: with tokens C is a vocabulary, the batch holds few.
    present = torch.unique(labels)
    if len(present) < 2:
        return logits.sum() * 0.0
    Y = (labels[:, None] == present).to(logits.dtype)
    Z, Y = _centred(logits, weights), _centred(Y, weights)
    eps = 0.01 * Z.square().sum(0).mean() + torch.finfo(Z.dtype).eps
    with torch.autocast(
        Z.device.type, enabled=False
    ):  # a near-singular system in bfloat16 is noise
        if len(Z) >= Z.shape[1]:
            fitted = Z @ torch.linalg.solve(_plus_diagonal(Z.T @ Z, eps), Z.T @ Y)
        else:  # the same in N x N: C may be a vocabulary
            outer = Z @ Z.T
            fitted = outer @ torch.linalg.solve(_plus_diagonal(outer, eps), Y)
    share: Tensor = (Y * fitted).sum() / Y.square().sum()
    return share


def _centred(rows: Tensor, weights: Tensor | None) -> Tensor:
    """Rows minus their (weighted) mean, each times the root of its weight."""
    if weights is None:
        return rows - rows.mean(0)
    mean = (weights[:, None] * rows).sum(0) / weights.sum()
    return (rows - mean) * weights.sqrt()[:, None]


def _plus_diagonal(matrix: Tensor, eps: Tensor) -> Tensor:
    return matrix + eps * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
