"""Tasks that a function of the user's own scores.

Whoever names a function in a recipe or an audit has it imported and called. Neither a release nor
its `trap2.json` is ever asked for one.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trap2.errors import UserError
from trap2.tasks.evaluation import Reading, Scored
from trap2.tasks.model import Inputs

BATCH = 64
"""Rows the function is given at once."""


class OwnFunction(Reading):
    """Kind `function`: `function(model, processor, inputs, labels)` scores rows. See `Reading`.

    The model is in evaluation mode, the processor is the base's tokenizer; inputs and labels are
    the values of the two columns. It returns one number in [0, 1] a row.
    """

    def __init__(self, inputs: Inputs, rows: Sequence[Any], labels: Sequence[Any]) -> None:
        self.batch_size, self.classes, self.chance = BATCH, 0, 0.0
        self.lengths = [0] * len(rows)
        self._inputs, self._rows, self._labels = inputs, rows, labels

    def read(self, model: nn.Module, places: Sequence[int]) -> Tensor:
        """What the function says (n, 1).

        Raises:
            UserError: It returns anything but one number in [0, 1] a row.
        """
        task = self._inputs.task
        assert task.function is not None
        rows, labels = ([values[i] for i in places] for values in (self._rows, self._labels))
        found = task.function(model, self._inputs.processor, rows, labels)
        try:
            scores = torch.as_tensor(found, dtype=torch.float32).cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"the function of task '{task.name}' returned a {type(found).__name__}; "
                "it must return one number in [0, 1] for each row"
            ) from error
        sound = scores.shape == (len(rows),) and bool(((scores >= 0) & (scores <= 1)).all())
        if not sound:
            raise UserError(
                f"the function of task '{task.name}' returned {tuple(scores.shape)} numbers from "
                f"{scores.min():g} to {scores.max():g} for {len(rows)} rows; it must return one in "
                "[0, 1] for each"
            )
        return scores[:, None]

    def evaluation(self, outputs: Tensor) -> Scored:
        """The scores as they are."""
        return Scored(outputs)
