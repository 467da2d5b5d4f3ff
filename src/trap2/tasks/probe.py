"""A linear probe: what a few labelled rows can read from a model's representation, head left aside.

Symbols: Z representation (N, D), standardised with the fitted rows' mean and spread; y labels (N,).
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
from sklearn.linear_model import RidgeClassifierCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from trap2.tasks.evaluation import Evaluation
from trap2.tasks.relabel import Bools, first_rows

PENALTIES = 10.0 ** np.arange(0, 6)
"""Ridge penalties tried; the best leave-one-out score on the fitted rows chooses."""


class Representation(nn.Module):
    """An encoder whose `.logits` are its last hidden states (N, D), averaged over tokens or places.

    Args:
        encoder: Gives `last_hidden_state`, (N, T, D) or (N, D, H, W).
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, **inputs: Tensor) -> Any:
        """The representation of a batch; padding does not count."""
        hidden: Tensor = self.encoder(**inputs).last_hidden_state
        if hidden.dim() == 4:
            return SimpleNamespace(logits=hidden.mean((2, 3)))
        mask = inputs.get("attention_mask", hidden.new_ones(hidden.shape[:2])).unsqueeze(-1)
        return SimpleNamespace(logits=(hidden * mask).sum(1) / mask.sum(1))


def probed_accuracy(fit: Evaluation, score: Evaluation, rows: int) -> float:
    """Share of `score` that the probe of `probed_correct` gets right.

    Raises:
        UserError: `fit` has fewer rows, or too few to fit anything.
    """
    return float(probed_correct(fit, score, rows).mean())


def probed_correct(fit: Evaluation, score: Evaluation, rows: int) -> Bools:
    """Which rows (N,) of `score` a ridge classifier fitted on the first `rows` of `fit` gets right.

    Args:
        fit: Representations of labelled rows the attacker has.
        score: Representations of the rows it is scored on.
        rows: How many of `fit` it may use.

    Raises:
        UserError: `fit` has fewer rows, or too few to fit anything.
    """
    Z, y = first_rows(fit, rows)
    new, labels = first_rows(score, len(score))
    if len(np.unique(y)) < 2:
        return np.asarray(labels == y[0])
    probe = make_pipeline(StandardScaler(), RidgeClassifierCV(alphas=PENALTIES))
    return np.asarray(probe.fit(Z, y).predict(new) == labels)
