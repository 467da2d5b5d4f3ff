"""What an evaluation found: outputs of every row, and a score of each in [0, 1] worked out of them.

Everything that judges (retained skill, the partners' share, intervals) needs the scores alone.
Only class outputs can be re-labelled.

Symbols: N rows, C classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

E = TypeVar("E", bound="Evaluation")


@dataclass(frozen=True)
class Evaluation(ABC):
    """How well a model does on some rows.

    Attributes:
        outputs: All that was read off the model, (N, K) float32, in the rows' order: what a ledger
            keeps.
    """

    outputs: Tensor

    @property
    @abstractmethod
    def scores(self) -> Tensor:
        """How well each row (N,) was done, in [0, 1]; 0 where the model gave no number."""

    @property
    @abstractmethod
    def loss(self) -> float:
        """Mean loss: in nats where there are probabilities, else the share that is wrong."""

    @property
    def compared(self) -> Tensor:
        """What must agree between two ways of running one model, but for rounding."""
        return self.outputs

    @property
    def accuracy(self) -> float:
        """Mean score of the rows."""
        return float(self.scores.mean())

    def __len__(self) -> int:
        return len(self.outputs)

    def after(self: E, rows: int) -> E:
        """The same without the first rows."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        cut = {n: v[rows:] if isinstance(v, Tensor) else v for n, v in values.items()}
        return type(self)(**cut)


@dataclass(frozen=True)
class Classification(Evaluation):
    """Logits (N, C) float32 and labels (N,)."""

    labels: Tensor

    @property
    def logits(self) -> Tensor:
        """The outputs by their name."""
        return self.outputs

    @property
    def scores(self) -> Tensor:
        """1 for rows whose largest logit is the label's; a row with NaN is wrong."""
        right = (self.logits.argmax(1) == self.labels) & torch.isfinite(self.logits).all(1)
        return right.float()

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats."""
        return float(F.cross_entropy(self.logits, self.labels))


@dataclass(frozen=True)
class Prediction(Evaluation):
    """Of the target tokens of each row: how many are right, their nats, how many there are.

    Attributes:
        outputs: (N, 3) float32: right, nats, tokens.
        likelihood: Whether a row's score is exp(-nats / tokens), the geometric mean of the
            probabilities of its target tokens, or else right / tokens.
    """

    likelihood: bool = False

    @property
    def scores(self) -> Tensor:
        """Share of right tokens, or exp(-loss), of each row."""
        right, nats, tokens = self.outputs.unbind(1)
        share = torch.exp(-nats / tokens) if self.likelihood else right / tokens
        return torch.where(torch.isfinite(nats), share, 0.0)

    @property
    def loss(self) -> float:
        """Mean nats of all target tokens."""
        return float(self.outputs[:, 1].sum() / self.outputs[:, 2].sum())

    @property
    def compared(self) -> Tensor:
        """The nats: a token may turn right by rounding, its probability does not jump."""
        return self.outputs[:, 1]


@dataclass(frozen=True)
class Scored(Evaluation):
    """Scores (N, 1) float32 in [0, 1], and nothing behind them."""

    @property
    def scores(self) -> Tensor:
        """The scores."""
        return torch.nan_to_num(self.outputs[:, 0], nan=0.0)

    @property
    def loss(self) -> float:
        """The share that is wrong."""
        return 1 - self.accuracy

    @property
    def compared(self) -> Tensor:
        """The mean: a single answer may turn by rounding."""
        return self.outputs.mean(0)


class Reading(ABC):
    """How the rows of one kind of task are read off a model.

    Attributes:
        lengths: Of the rows, so that batches are of rows of like length.
        batch_size: Rows read at once.
        classes: Number of class outputs; 0 where there are none to re-label.
        chance: Score of who gives every row the most frequent answer; 0 where that is not known.
    """

    lengths: Sequence[int]
    batch_size: int
    classes: int
    chance: float

    @abstractmethod
    def read(self, model: nn.Module, places: Sequence[int]) -> Tensor:
        """Outputs (n, K) of the rows at some places, from a model in evaluation mode."""

    @abstractmethod
    def evaluation(self, outputs: Tensor) -> Evaluation:
        """What the outputs (N, K) of all rows say."""
