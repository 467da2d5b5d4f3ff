"""Token labels: which positions carry a target, and which token a position predicts."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from trap2.protecting.losses import IGNORED
from trap2.protecting.wrappers import unwrapped

ALIGNED = ("ForMaskedLM", "ForTokenClassification")
"""transformers' `loss_type` of decoders and encoders whose position t predicts label t."""


def shifts_labels(model: nn.Module) -> bool:
    """Whether position t of a model that predicts tokens answers to label t + 1.

    True for causal language models, and for what is not from transformers; False for
    encoder-decoders, masked language models and token classifiers.
    """
    inner: Any = unwrapped(model)
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        return False
    return getattr(inner, "loss_type", None) not in ALIGNED


def targets_per_row(batch: Mapping[str, Any], shifted: bool) -> float:
    """How many targets a row of a batch has on average; 1 where labels are one a row, or unseen."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() < 2 or labels.is_floating_point():
        return 1.0
    return target_count(batch, shifted) / len(labels)


def target_count(batch: Mapping[str, Any], shifted: bool) -> int:
    """How many positions of a batch carry a target; rows, where labels are one a row.

    Args:
        batch: With integer `labels`, (N,) or (N, T), or `shift_labels` (N, T); or real-valued ones.
        shifted: Whether the model shifts token labels itself: the first one is then no target.
    """
    labels: Tensor = batch["labels"]
    if labels.is_floating_point():  # regression, or several labels a row
        return len(labels)
    if "shift_labels" in batch:
        labels = batch["shift_labels"]
    elif shifted and labels.dim() > 1:
        labels = labels[..., 1:]
    return int(labels.ne(IGNORED).sum())
