"""`trap2 protect`: a recipe in, a release folder out, on transformers' Trainer.

While it runs, everything lies in `<out>.work`: the trainer's own checkpoints, and the best
candidate so far. The release folder appears whole at the end or not at all.
"""

import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed
from transformers.trainer_pt_utils import LengthGroupedSampler

from trap2.errors import UserError
from trap2.files import new_folder, read_json, refuse_existing, write_json
from trap2.protecting.callbacks import BestCandidate, ProgressBar
from trap2.protecting.config import Trap2Config
from trap2.protecting.release import write_release
from trap2.protecting.trainable import checkpoint_activations, trainable
from trap2.protecting.trainer import protect_trainer
from trap2.recipes import Recipe, config_from
from trap2.statistics import Batches, mixed, normalising
from trap2.tasks.data import Rows, load_rows
from trap2.tasks.evaluate import Evaluator
from trap2.tasks.language import padded, pairs, tokens
from trap2.tasks.model import Inputs, base_folder, build, load_encoder, placed
from trap2.tasks.relabel import readable_accuracy
from trap2.taskspec import TRAINED, TaskSpec

COUNTED_ROWS = 512
"""Rows on which a checkpoint's batch-norm statistics are counted."""

TORCH_SAVE = "inline_container"
"""The only sign that `torch.save` could not write: a `RuntimeError` that names its own source."""


class EncodedRows(Dataset[dict[str, Any]]):
    """Training rows in the form the trainer samples and batches."""

    def __init__(self, inputs: Inputs, rows: Rows) -> None:
        self._inputs, self._labels = inputs, rows.labels
        self._encoded = inputs.encode(list(rows.inputs))

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self._encoded[index], "labels": self._labels[index]}

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch of tensors with `labels` (N,)."""
        batch = self._inputs.batch([row["input_ids"] for row in rows])
        return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}


class LanguageRows(Dataset[dict[str, Any]]):
    """Training rows of a language model: every completion is to be predicted from its prompt."""

    def __init__(self, inputs: Inputs, rows: Rows) -> None:
        self._pad = inputs.pad
        self._rows = tokens(inputs, *pairs(inputs, rows.inputs, rows.labels))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self._rows[index].ids, "row": self._rows[index]}

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch of tensors with `labels` (N, T)."""
        return padded([row["row"] for row in rows], self._pad)


def protect(
    recipe: Recipe, out: Path, *, overwrite: bool = False, resume: bool = False, quiet: bool = False
) -> Path:
    """Fine-tune by a recipe, with the trap unless its strength is 0, and write the release.

    Args:
        recipe: What to do.
        out: The release folder to make.
        overwrite: Replace a release that is there.
        resume: Continue an interrupted run from its last whole checkpoint.
        quiet: No progress bar.

    Returns:
        The release folder.

    Raises:
        UserError: The recipe, the data or the base is not acceptable.
        TrainingStopped: A loss became NaN or infinite; checkpoints stay in `<out>.work`.
    """
    config: Trap2Config = config_from({"scale_seed": recipe.seed, **recipe.trap2}, Trap2Config)
    task = recipe.task
    _check_kind(task)
    refuse_existing(out, overwrite)
    work = out.with_name(out.name + ".work")
    _check_claim(work, recipe, resume, overwrite)
    base = base_folder(recipe.base)
    set_seed(recipe.seed)
    encoder = load_encoder(base, task.is_language)
    inputs = Inputs(base, task)
    model = build(base, task, encoder, inputs)
    rows = load_rows(task, "validation", recipe.seed)
    validation = Evaluator(model, inputs, rows, recipe.training.precision)
    base_leak = readable_accuracy(validation())
    dataset = LanguageRows if task.is_language else EncodedRows
    data = dataset(inputs, load_rows(task, "train", recipe.seed))
    if recipe.training.gradient_checkpointing:
        checkpoint_activations(encoder, recipe)
    model = validation.model = trainable(model, recipe)
    if not resume:
        _claim(work, recipe)
    trainer = _trainer(recipe, config, model, data, work)
    counted_on = _counted_on(model, data, recipe.seed)
    every = recipe.training.evaluate_every
    best = BestCandidate(trainer, validation, base_leak, every, work, counted_on)
    trainer.add_callback(best)
    started = time.monotonic()
    with tqdm(total=recipe.training.steps, desc=_title(task, config), disable=quiet) as bar:
        trainer.add_callback(ProgressBar(trainer, bar))
        _train(trainer, work, resume)
    best.restore()
    with new_folder(out, overwrite) as folder:
        write_release(
            folder,
            recipe=recipe,
            config=asdict(config),
            base=base,
            model=model,
            update=trainer.update,
            validation=validation,
            history=[candidate.record() for candidate in best.history],
            chosen=best.chosen.record(),
            seconds=time.monotonic() - started,
            dropped=trainer.dropped,
            log=trainer.state.log_history,
            surrogates=trainer.surrogates.tasks if trainer.surrogates else (),
            counted_on=counted_on,
        )
    shutil.rmtree(work)
    return out


def _trainer(recipe: Recipe, config: Trap2Config, model: nn.Module, data: Any, work: Path) -> Any:
    trainer = protect_trainer(EpochTrainer)(
        model=model,
        args=_arguments(recipe, work),
        train_dataset=data,
        data_collator=data.collate,
        trap2=config,
    )
    trainer.remove_callback(PrinterCallback)
    if not recipe.task.is_language:
        # Heads ignore the trainer's item count: the trainer divides by the accumulation steps.
        trainer.model_accepts_loss_kwargs = False
    return trainer


def _counted_on(model: nn.Module, data: Any, seed: int) -> Batches:
    """Training rows to count running statistics on; none if training moves no statistics."""
    if not any(layer.training for layer in normalising(model.train())):
        return ()
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    return [
        placed(data.collate([data[row] for row in rows]), model)
        for rows in mixed([order[:COUNTED_ROWS]])
    ]


def _check_kind(task: TaskSpec) -> None:
    if task.kind not in TRAINED:
        raise UserError(
            f"task '{task.name}' is of kind {task.kind}, which judges and gives nothing to learn; "
            f"train with one of {', '.join(TRAINED)} and audit with this one"
        )


def _train(trainer: Any, work: Path, resume: bool) -> None:
    """Run the training; a full disk ends in one line, with the checkpoints so far in place."""
    try:
        trainer.train(resume_from_checkpoint=_last_whole_checkpoint(work) if resume else None)
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and TORCH_SAVE not in str(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot write checkpoints in {work}: {reason}; free space, then go on with --resume"
        ) from error


class ByLength(LengthGroupedSampler):
    """Batches of like length, in an order drawn from (seed, epoch): a resume finds it again."""

    def __init__(self, batch_size: int, rows: Any, seed: int) -> None:
        super().__init__(batch_size, dataset=rows)
        self._seed, self._epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer at the start of each epoch."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(1_000_003 * self._seed + self._epoch)
        order: Iterator[int] = super().__iter__()  # type: ignore[no-untyped-call]
        return order


class EpochTrainer(Trainer):
    """Trainer whose order of rows depends on the seed and the epoch only."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        rows = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return ByLength(rows, train_dataset or self.train_dataset, self.args.seed)


def _title(task: TaskSpec, config: Trap2Config) -> str:
    return f"{task.name} {'without a trap' if config.strength == 0 else 'with the trap'}"


def _check_claim(work: Path, recipe: Recipe, resume: bool, overwrite: bool) -> None:
    """Refuse a work folder that belongs to another run, or one to resume that is not there."""
    recorded = work / "recipe.json"
    if resume:
        if not recorded.is_file():
            raise UserError(f"{work} holds no interrupted run; run without --resume")
        if read_json(recorded) != json.loads(recipe.model_dump_json()):
            raise UserError(
                f"{work} was left by another recipe; resume with that one, or run without --resume"
            )
        return
    if work.exists() and not overwrite:
        raise UserError(
            f"{work} holds an interrupted run; pass --resume to go on or --overwrite to start again"
        )


def _claim(work: Path, recipe: Recipe) -> None:
    """Make the work folder anew, once everything the run needs is known to be there."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    write_json(work / "recipe.json", json.loads(recipe.model_dump_json()))


def _arguments(recipe: Recipe, work: Path) -> TrainingArguments:
    spec = recipe.training
    by_length = spec.batch_by_length and recipe.task.kind != "image"
    return TrainingArguments(
        output_dir=str(work / "checkpoints"),
        max_steps=spec.steps,
        per_device_train_batch_size=spec.batch_size,
        gradient_accumulation_steps=spec.gradient_accumulation,
        learning_rate=spec.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=spec.lr_warmup_steps,
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_grad_norm,
        bf16=spec.precision == "bfloat16",
        train_sampling_strategy="group_by_length" if by_length else "random",
        seed=recipe.seed,
        save_steps=spec.evaluate_every,
        save_total_limit=2,
        logging_steps=math.gcd(10, spec.evaluate_every),  # a checkpoint cuts no mean in two
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        report_to=[],
    )


def _last_whole_checkpoint(work: Path) -> str | None:
    """The newest checkpoint whose last-written file is there and sound; None to start anew."""
    found = sorted(
        (work / "checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1])
    )
    for folder in reversed(found):
        try:
            read_json(folder / "trainer_state.json")
        except UserError:
            continue
        return str(folder)
    return None
