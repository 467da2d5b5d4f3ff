"""Tasks with classes: the logits of a head, texts or images."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trap2.tasks.evaluation import Classification, Reading
from trap2.tasks.model import Inputs, placed

BATCH = 64
"""Rows per forward pass."""


class Classes(Reading):
    """See `Reading`.

    Args:
        inputs: The task's tokenizer or image processor.
        rows: Texts or images.
        labels: Their class indices.
    """

    def __init__(self, inputs: Inputs, rows: Sequence[Any], labels: Sequence[int]) -> None:
        self.inputs, self.batch_size, self.classes = inputs, BATCH, len(inputs.task.classes)
        self.labels = torch.tensor(labels)
        self.chance = most_frequent(labels)
        self._encoded = inputs.encode(list(rows))
        image = inputs.task.kind == "image"
        self.lengths = [0 if image else len(row) for row in self._encoded]

    def batch(self, places: Sequence[int], model: nn.Module) -> dict[str, Tensor]:
        """The rows at some places as the model takes them."""
        return placed(self.inputs.batch([self._encoded[i] for i in places]), model)

    def read(self, model: nn.Module, places: Sequence[int]) -> Tensor:
        """Logits (n, C)."""
        logits: Tensor = model(**self.batch(places, model)).logits
        return logits

    def evaluation(self, outputs: Tensor) -> Classification:
        """Which rows are right."""
        return Classification(outputs, self.labels)


def most_frequent(answers: Sequence[Any]) -> float:
    """Share of the most frequent answer."""
    return max(Counter(answers).values()) / len(answers)
