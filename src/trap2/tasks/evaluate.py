"""How well a model does on the rows of a task, whatever its kind."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trap2.errors import UserError
from trap2.tasks.classes import Classes
from trap2.tasks.data import Rows
from trap2.tasks.evaluation import Evaluation, Reading
from trap2.tasks.harness import HarnessTask
from trap2.tasks.language import Choices, Completions, Generations
from trap2.tasks.model import Inputs, device_of
from trap2.tasks.own_function import OwnFunction

READINGS: dict[str, Callable[[Inputs, Sequence[Any], Sequence[Any]], Reading]] = {
    "text": Classes,
    "image": Classes,
    "language": Completions,
    "generation": Generations,
    "choice": Choices,
    "lm_eval": HarnessTask,
    "function": OwnFunction,
}
"""How each kind of task is read off a model."""


class Evaluator:
    """One task's rows in front of one model, tokenised once and batched by length.

    Args:
        model: The model with the task's head, or the language model.
        inputs: The task's tokenizer or image processor.
        rows: What to evaluate on.
        precision: "bfloat16" runs the model under autocast; its weights stay as they are.
        batch_size: Rows per forward pass; by default what the kind of task reads at once.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        rows: Rows,
        precision: str = "float32",
        batch_size: int | None = None,
    ) -> None:
        self.model, self.inputs = model, inputs
        self._mixed = precision == "bfloat16"
        self.reading = READINGS[inputs.task.kind](inputs, rows.inputs, rows.labels)
        size = batch_size or self.reading.batch_size
        order = sorted(range(len(rows)), key=lambda i: self.reading.lengths[i])
        self._batches = [order[i : i + size] for i in range(0, len(rows), size)]
        self._count = len(rows)

    def __len__(self) -> int:
        return self._count

    @property
    def labels(self) -> Tensor:
        """The class indices (N,) of the rows."""
        return self._of_classes().labels

    def batch(self, places: Sequence[int]) -> dict[str, Tensor]:
        """The rows at some places as a model with classes takes them, on its device."""
        return self._of_classes().batch(places, self.model)

    def _of_classes(self) -> Classes:
        if isinstance(self.reading, Classes):
            return self.reading
        raise UserError(
            f"task '{self.inputs.task.name}' is of kind {self.inputs.task.kind} and has no head of "
            "classes; use kind text or image"
        )

    @torch.no_grad()
    def __call__(self) -> Evaluation:
        """Evaluate the model as it is now, in evaluation mode; its mode is restored."""
        training = self.model.training
        self.model.eval()
        outputs: Tensor | None = None
        device = device_of(self.model).type
        for batch in self._batches:
            with torch.autocast(device, torch.bfloat16, enabled=self._mixed):
                found = self.reading.read(self.model, batch)
            if outputs is None:
                outputs = torch.zeros(len(self), found.shape[1])
            outputs[list(batch)] = found.float().cpu()
        self.model.train(training)
        assert outputs is not None
        return self.reading.evaluation(outputs)
