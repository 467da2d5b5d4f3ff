"""Trap losses: what the scaled model is driven towards. All are minimised.

Symbols: N rows, C classes; Z logits (N, C), Y one-hot labels (N, C), both centred over the rows in
the read-out; p_y probability of the true label. Of regression and of several labels a row, C is the
number of outputs and Y their targets, real-valued.

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
        labels: (N,) or (N, T) integer labels; real-valued targets (N,) or (N, C).
        shifted: Whether the model shifts token labels itself: position t predicts token t + 1.
    """

    loss: Tensor
    logits: Tensor | None = None
    labels: Tensor | None = None
    shifted: bool = True

    def rows(self, most: int | None = None) -> tuple[Tensor, Tensor]:
        """Logits (M, C), float32 at least, and labels (M,) of the positions that carry a target.

        Real-valued targets are (M, C).

        Args:
            most: How many of them, spread over all of them; by default all.

        Raises:
            UserError: There are no outputs or targets to work on.
        """
        logits, labels = self.logits, self.labels
        if logits is None or labels is None or (self.is_real_valued and not self._fits):
            raise UserError(
                "this trap loss needs logits and labels of the same rows, the model gives none; "
                "use loss=hinge with readout_weight=0, which need only the loss"
            )
        wide = torch.promote_types(logits.dtype, torch.float32)
        if self.is_real_valued:
            some = _spread(len(logits), most, logits.device)
            return logits[some].to(wide), labels.reshape(logits.shape)[some].to(wide)
        if logits.dim() == 3:
            if self.shifted:
                logits, labels = logits[:, :-1], labels[:, 1:]
            logits, labels = logits.flatten(0, 1), labels.flatten()
        kept = (labels != IGNORED).nonzero().flatten()
        kept = kept[_spread(len(kept), most, kept.device)]
        return logits[kept].to(wide), labels[kept]

    @property
    def is_real_valued(self) -> bool:
        """Whether the targets are numbers and not classes: regression, or several labels a row."""
        return self.labels is not None and self.labels.is_floating_point()

    @property
    def _fits(self) -> bool:
        logits, labels = self.logits, self.labels
        return (
            logits is not None
            and labels is not None
            and logits.dim() == 2
            and labels.numel() == logits.numel()
        )


def _spread(count: int, most: int | None, device: torch.device) -> Tensor:
    """Places of all rows, or of so many, from all over."""
    if most is None or count <= most:
        return torch.arange(count, device=device)
    return torch.arange(1, 2 * most, 2, device=device) * count // (2 * most)


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
    if outcome.is_real_valued:
        raise UserError(
            "loss=unlikelihood needs integer labels, and these are real-valued; use decoy, or "
            "hinge, which needs only the loss"
        )
    others = logits.scatter(1, labels[:, None], float("-inf"))
    return (logits.logsumexp(1) - others.logsumexp(1)).sum() / max(1, len(labels))


@trap_loss
def decoy(outcome: Outcome) -> Tensor:
    """Cross-entropy towards one constant class, whatever the input.

    Of real-valued targets: log(1 + d^2) with d the distance of an output from the mean target of
    the rows, in standard deviations of it.
    """
    logits, labels = outcome.rows()
    if outcome.is_real_valued:
        spread = labels.std(0, unbiased=False)
        distance = (logits - labels.mean(0)) / spread.where(spread > 0, 1.0)
        return distance.square().log1p().sum() / max(1, labels.numel())
    answers = torch.full_like(labels, DECOY_CLASS)
    return F.cross_entropy(logits, answers, reduction="sum") / max(1, len(labels))


@trap_loss
def readout(outcome: Outcome) -> Tensor:
    """Share of the labels that the best linear map of the outputs explains, in [0, 1].

    R2 = tr(Y' Z (Z'Z + eps I)^-1 Z'Y) / tr(Y'Y) with eps = 1 % of the mean diagonal of Z'Z.
    Indifferent to shifts, permutations and the size of the logits. Needs several rows of more than
    one class: with fewer there is nothing to read and it is 0. Real-valued targets count alike,
    whatever their units.
    """
    return explained_share(*outcome.rows(READ))


def explained_share(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """R2 of the best linear map of the outputs to the labels: see `readout`.

    Args:
        logits: (N, C).
        labels: (N,), integers; or (N, C) real-valued targets.
        weights: (N,), how much each row counts; all the same by default.

    Returns:
        A scalar in [0, 1].
    """
    Y = _targets(labels, weights)
    if Y.shape[1] == 0:
        return logits.sum() * 0.0
    Z, Y = _centred(logits, weights), _centred(Y.to(logits.dtype), weights)
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


def _targets(labels: Tensor, weights: Tensor | None) -> Tensor:
    """Y before it is centred; no columns where nothing differs from row to row."""
    if labels.is_floating_point():
        sizes = _centred(labels, weights).square().sum(0).sqrt()
        differs = sizes > 1e-6 * labels.abs().amax(0) if len(labels) else sizes > 0
        targets: Tensor = labels[:, differs] / sizes[differs]
        return targets
    # Only classes that occur carry variance: with tokens C is a vocabulary, the batch holds few.
    present = torch.unique(labels)
    one_hot: Tensor = labels[:, None] == (present if len(present) > 1 else present[:0])
    return one_hot


def _centred(rows: Tensor, weights: Tensor | None) -> Tensor:
    """Rows minus their (weighted) mean, each times the root of its weight."""
    if weights is None:
        return rows - rows.mean(0)
    mean = (weights[:, None] * rows).sum(0) / weights.sum()
    return (rows - mean) * weights.sqrt()[:, None]


def _plus_diagonal(matrix: Tensor, eps: Tensor) -> Tensor:
    return matrix + eps * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
