"""What `trap2 protect` does beside the steps: judge checkpoints, keep the best, show progress."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

from trap2.files import read_json, write_json
from trap2.protecting.selection import Candidate, judge
from trap2.statistics import Batches
from trap2.tasks.evaluate import Evaluator


class BestCandidate(TrainerCallback):
    """Judges the model every so many steps and keeps the best, on disk so that a resume has it."""

    def __init__(
        self,
        trainer: Any,
        validation: Evaluator,
        base_leak: float,
        every: int,
        work: Path,
        counted_on: Batches = (),
    ) -> None:
        self._trainer, self._validation, self._every = trainer, validation, every
        self._base_leak, self._work, self._counted_on = base_leak, work, counted_on
        self.history: list[Candidate] = []

    @property
    def chosen(self) -> Candidate:
        """The best candidate; on equal scores the more useful one, then the later one.

        Where nothing is protected utility and leak cancel out: scores then differ by rounding only.
        """
        return max(self.history, key=lambda c: (round(c.score, 4), c.utility, c.step))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """On a resume, take back what was judged before the checkpoint."""
        path = self._work / "candidates.json"
        if state.global_step > 0 and path.is_file():
            kept = read_json(path)["candidates"]
            self.history = [Candidate(**c) for c in kept if c["step"] <= state.global_step]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Judge; keep the weights if they are the best so far."""
        if state.global_step % self._every and state.global_step != state.max_steps:
            return
        plain = self._trainer.trap2.strength == 0
        candidate = judge(
            self._trainer.update,
            self._validation,
            state.global_step,
            self._base_leak,
            plain,
            self._counted_on,
        )
        self.history = [c for c in self.history if c.step != candidate.step] + [candidate]
        if self.chosen is candidate:
            partial = self._weights(candidate).with_suffix(".partial")
            save_file({n: p.detach().contiguous() for n, p in self._trained()}, partial)
            partial.replace(self._weights(candidate))
        write_json(
            self._work / "candidates.json", {"candidates": [asdict(c) for c in self.history]}
        )

    def restore(self) -> None:
        """Put the best candidate's weights back into the model."""
        kept = load_file(self._weights(self.chosen))
        with torch.no_grad():
            for name, tensor in self._trained():
                tensor.copy_(kept[name])

    def _weights(self, candidate: Candidate) -> Path:
        return self._work / f"candidate-{candidate.step}.safetensors"

    def _trained(self) -> list[tuple[str, Tensor]]:
        """Trained parameters, and the buffers training moves (batch-norm statistics)."""
        model = self._trainer.model
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        return trained + [(n, b) for n, b in model.named_buffers() if b.is_floating_point()]


class ProgressBar(TrainerCallback):
    """One line: steps, remaining time, nominal and trap loss."""

    def __init__(self, trainer: Any, bar: Any) -> None:
        self._trainer, self._bar = trainer, bar

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """On a resume, start from the checkpoint."""
        self._bar.initial = self._bar.n = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance it."""
        last = self._trainer.last
        trap = "-" if last.trap is None else f"{last.trap:.3f}"
        self._bar.set_postfix_str(f"nominal {last.nominal:.3f}, trap {trap}", refresh=False)
        self._bar.update()
