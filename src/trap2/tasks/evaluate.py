"""How well a model does on rows: logits first, every score from them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trap2.tasks.data import Rows
from trap2.tasks.model import Inputs


@dataclass(frozen=True)
class Evaluation:
    """Logits (N, C) float32 and labels (N,) of some rows, in the rows' order."""

    logits: Tensor
    labels: Tensor

    @property
    def correct(self) -> Tensor:
        """Which rows' (N,) largest logit is the label's; a NaN row counts as wrong."""
        return (self.logits.argmax(1) == self.labels) & torch.isfinite(self.logits).all(1)

    @property
    def accuracy(self) -> float:
        """Share of rows that are right."""
        return float(self.correct.float().mean())

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats."""
        return float(F.cross_entropy(self.logits, self.labels))


class Evaluator:
    """One task's rows in front of one model, tokenised once and batched by length.

    Args:
        model: Gives `.logits`.
        inputs: The task's tokenizer or image processor.
        rows: What to evaluate on.
        precision: "bfloat16" runs the model under autocast; its weights stay as they are.
        batch_size: Rows per forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        rows: Rows,
        precision: str = "float32",
        batch_size: int = 64,
    ) -> None:
        self.model, self.inputs = model, inputs
        self._mixed = precision == "bfloat16"
        self._encoded = inputs.encode(list(rows.inputs))
        self.labels = torch.tensor(rows.labels)
        order = range(len(rows))
        if inputs.task.kind == "text":
            order = sorted(order, key=lambda i: len(self._encoded[i]))  # type: ignore[assignment]
        self._batches = [order[i : i + batch_size] for i in range(0, len(rows), batch_size)]

    def batch(self, places: Sequence[int]) -> dict[str, Tensor]:
        """The rows at some places as the model takes them, on its device."""
        device = next(self.model.parameters()).device
        tensors = self.inputs.batch([self._encoded[i] for i in places])
        return {name: value.to(device) for name, value in tensors.items()}

    @torch.no_grad()
    def __call__(self) -> Evaluation:
        """Evaluate the model as it is now, in evaluation mode; its mode is restored."""
        training = self.model.training
        self.model.eval()
        logits: Tensor | None = None
        device = next(self.model.parameters()).device.type
        for batch in self._batches:
            with torch.autocast(device, torch.bfloat16, enabled=self._mixed):
                output = self.model(**self.batch(batch)).logits
            if logits is None:
                logits = torch.zeros(len(self.labels), output.shape[1])
            logits[list(batch)] = output.float().cpu()
        self.model.train(training)
        assert logits is not None
        return Evaluation(logits, self.labels)
