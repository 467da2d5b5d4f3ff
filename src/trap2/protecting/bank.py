"""`trap2 surrogates`: a bank of surrogate updates, each an ordinary release without a trap.

While it is made everything lies in `<out>.partial`, and the same command goes on where it was
killed. `bank.json` says what is in it, with seeds and digests; nothing in it depends on the time.
"""

import csv
import io
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trap2.checkpoint import Checkpoint
from trap2.errors import UserError
from trap2.files import read_json, refuse_existing, weights_digest, write_json, write_text
from trap2.protecting.pseudo_tasks import pseudo_task
from trap2.protecting.run import protect
from trap2.protecting.trainable import linear_maps
from trap2.recipes import BankRecipe, LoraSpec, Recipe
from trap2.scales import generator
from trap2.tasks.data import load_rows
from trap2.tasks.model import Inputs, base_folder, embed, load_encoder, placed
from trap2.taskspec import DataSpec, TaskSpec

RANKS = (4, 8, 16, 32)
SHARES = (0.5, 0.75, 1.0)
"""Of the base's linear maps, how many a surrogate's adapter is on."""

VALIDATION = 64
"""Rows on which a surrogate is judged, of a pseudo-task its own: how good it is matters little."""


def build_bank(
    recipe: BankRecipe, out: Path, *, overwrite: bool = False, quiet: bool = False
) -> Path:
    """Fine-tune the surrogates that are missing and write the bank.

    Args:
        recipe: What to do.
        out: The bank's folder.
        overwrite: Replace a bank that is there, or one that was left unfinished.
        quiet: No progress bars.

    Returns:
        The bank's folder.

    Raises:
        UserError: The recipe, its rows or the base is not acceptable, or the place is taken.
    """
    refuse_existing(out, overwrite)
    work = out.with_name(out.name + ".partial")
    asked = json.loads(recipe.model_dump_json())
    _check_claim(work, asked, overwrite)
    base = base_folder(recipe.base)
    encoder = load_encoder(base)
    targets = linear_maps(encoder, [])
    texts = _Texts(recipe, base, encoder)
    work.mkdir(parents=True, exist_ok=True)
    write_json(work / "recipe.json", asked)
    entries = []
    for place, source in enumerate(_plan(recipe)):
        name, seed = f"{place:02d}-{source}", 1000 * recipe.seed + place
        one = _recipe(recipe, texts, source, seed, targets, work / f"{name}.csv")
        folder = work / name
        if not (folder / "trap2.json").is_file():
            started = (work / f"{name}.work" / "recipe.json").is_file()
            protect(one, folder, resume=started, quiet=quiet)
        entry = {"name": name, "task": one.task.name, "kind": source, "seed": seed}
        entries.append({**entry, "r": one.lora.r, "digest": weights_digest(folder)})
    record = {"schema_version": 1, "base": recipe.base, "base_digest": Checkpoint(base).digest}
    write_json(work / "bank.json", {**record, "surrogates": entries})
    if out.exists():
        shutil.rmtree(out)
    return work.replace(out)


def _check_claim(work: Path, asked: dict[str, Any], overwrite: bool) -> None:
    """An unfinished bank is gone on with by the same recipe alone."""
    recorded = work / "recipe.json"
    if overwrite or not recorded.is_file():
        shutil.rmtree(work, ignore_errors=True)
    elif read_json(recorded) != asked:
        raise UserError(
            f"{work} holds an unfinished bank of another recipe; go on with that one, or pass "
            "--overwrite to start again"
        )


def _plan(recipe: BankRecipe) -> list[str]:
    """What each surrogate is made from: kinds and tasks in turn."""
    sources = [*(recipe.kinds if recipe.texts else ()), *(task.name for task in recipe.tasks)]
    return [sources[place % len(sources)] for place in range(recipe.count)]


class _Texts:
    """The unlabelled texts, with their embeddings by the base."""

    def __init__(self, recipe: BankRecipe, base: Path, encoder: torch.nn.Module) -> None:
        self.texts: list[str] = []
        self.embeddings = torch.zeros(0, 0)
        if recipe.texts is None or not recipe.kinds:
            return
        limit = {"train": recipe.rows}
        plain = TaskSpec(name="texts", kind="language", data=recipe.texts, limit=limit)
        self.texts = [str(text) for text in load_rows(plain, "train", recipe.seed).labels]
        spec = TaskSpec(
            name="texts", classes=["a", "b"], data=recipe.texts, max_length=recipe.max_length
        )
        self.embeddings = _embedded(encoder, Inputs(base, spec), self.texts)


@torch.no_grad()
def _embedded(encoder: torch.nn.Module, inputs: Inputs, texts: Sequence[str]) -> Tensor:
    encoded = inputs.encode([*texts])
    batches = [encoded[start : start + 64] for start in range(0, len(encoded), 64)]
    return torch.cat([embed(encoder, placed(inputs.batch(b), encoder)).cpu() for b in batches])


def _recipe(
    recipe: BankRecipe,
    texts: _Texts,
    source: str,
    seed: int,
    targets: list[str],
    rows: Path,
) -> Recipe:
    """The fine-tune of one surrogate; the rows of a pseudo-task are written beside it."""
    drawn = generator(f"trap2 surrogate {seed}")
    own = {task.name: task for task in recipe.tasks}.get(source)
    if own is None:
        made = pseudo_task(source, texts.texts, texts.embeddings, drawn)
        table = io.StringIO()
        csv.writer(table).writerows([("text", "label"), *zip(made.texts, made.labels, strict=True)])
        write_text(rows, table.getvalue())
        own = TaskSpec(
            name=rows.stem,
            data=DataSpec(train=rows, validation=rows),
            classes=[f"class {c}" for c in range(len(made.descriptions))],
            descriptions=made.descriptions,
            max_length=recipe.max_length,
        )
    r = RANKS[int(torch.randint(len(RANKS), (), generator=drawn))]
    share = SHARES[int(torch.randint(len(SHARES), (), generator=drawn))]
    kept = torch.randperm(len(targets), generator=drawn)[: math.ceil(share * len(targets))]
    return Recipe(
        base=recipe.base,
        task=own.model_copy(update={"limit": {**own.limit, "validation": VALIDATION}}),
        lora=LoraSpec(r=r, alpha=2 * r, targets=[targets[i] for i in sorted(kept.tolist())]),
        training=recipe.training,
        trap2={"strength": 0},
        seed=seed,
    )
