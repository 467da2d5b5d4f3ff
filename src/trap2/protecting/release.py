"""The release folder: weights others can load without this package, `trap2.json`, a model card."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from trap2.checkpoint import Checkpoint
from trap2.files import file_digest, write_json, write_text
from trap2.protecting.card import model_card
from trap2.protecting.scaled import LiveUpdate
from trap2.provenance import machine, now, versions
from trap2.recipes import Recipe
from trap2.statistics import Batches, recomputed
from trap2.tasks.evaluate import Evaluator
from trap2.tasks.model import DescriptionClassifier
from trap2.tasks.relabel import readable_accuracy

CURVE = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1, 1.3, 1.6)
"""Scales of the validation curve in `trap2.json`."""


def write_release(
    folder: Path,
    *,
    recipe: Recipe,
    config: dict[str, Any],
    base: Path,
    model: nn.Module,
    update: LiveUpdate,
    validation: Evaluator,
    history: list[dict[str, Any]],
    chosen: dict[str, Any],
    seconds: float,
    dropped: int,
    log: list[dict[str, float]],
    surrogates: Sequence[str],
    counted_on: Batches = (),
) -> None:
    """Fill a release folder.

    Args:
        folder: Where; it exists and is empty.
        recipe: What was asked for.
        config: All settings of the trap.
        base: Folder of the base.
        model: The trained model.
        update: Its update, for the scale curve.
        validation: The model on validation rows.
        history: Scores of all checkpoints.
        chosen: Scores of the released one.
        seconds: Duration of the training.
        dropped: Trap passes that were not finite and were left out.
        log: What the trainer logged: means over the steps since the entry before.
        surrogates: Tasks of the surrogates it was trained against.
        counted_on: Rows to count running statistics on, at every scale of the curve.
    """
    _save_weights(folder, model, validation)
    record = {
        "schema_version": 1,
        "recipe": json.loads(recipe.model_dump_json()),
        "trap2": config,
        "seed": recipe.seed,
        "versions": versions(),
        "machine": machine(),
        "created": now(),
        "training_seconds": round(seconds, 1),
        "dropped_traps": dropped,
        "surrogates": list(surrogates),
        "digests": {
            "base": Checkpoint(base).digest,
            "files": {p.name: file_digest(p) for p in sorted(folder.glob("*.safetensors"))},
        },
        "validation": {
            "rows": len(validation),
            "chosen": chosen,
            "history": history,
            "scale_curve": scale_curve(update, validation, counted_on),
        },
        "log": [_rounded(entry) for entry in log if "loss" in entry],
    }
    write_json(folder / "trap2.json", record)
    write_text(folder / "README.md", model_card(record))


def _rounded(entry: dict[str, float]) -> dict[str, float]:
    """To five digits: a log is for reading."""
    return {k: v if isinstance(v, int) else float(f"{v:.5g}") for k, v in entry.items()}


def scale_curve(
    update: LiveUpdate, evaluator: Evaluator, counted_on: Batches = ()
) -> list[dict[str, float | None]]:
    """Accuracy (raw, and re-labelled if there are classes) and loss of the model at each scale."""
    points: list[dict[str, float | None]] = []
    for s in CURVE:
        with update.at(s), recomputed(update.model, counted_on):
            result = evaluator()
        points.append(
            {
                "s": s,
                "accuracy": result.accuracy,
                "relabelled": readable_accuracy(result) if evaluator.reading.classes else None,
                "loss": result.loss,
            }
        )
    return points


def _save_weights(folder: Path, model: nn.Module, validation: Evaluator) -> None:
    saved: Any = model.encoder if isinstance(model, DescriptionClassifier) else model
    saved.save_pretrained(folder, safe_serialization=True)
    if not (folder / "adapter_config.json").is_file():
        validation.inputs.processor.save_pretrained(folder)
