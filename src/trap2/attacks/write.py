"""What an attacker gets in the end: the merge on disk, with a record of what it is made of."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from trap2.attacks.attack import Attack, common_base, load_attacks, merge
from trap2.attacks.merged_adapter import check_adapter, write_adapter
from trap2.attacks.merged_model import write_model
from trap2.attacks.undo import undone
from trap2.attacks.vectors import TaskVector
from trap2.errors import UserError
from trap2.files import nested, new_folder, read_json, refuse_existing, write_json
from trap2.provenance import now, versions
from trap2.update import Update

Form = Literal["model", "adapter"]


def write_merge(
    out: Path,
    attack: str,
    updates: Sequence[Update],
    coefficients: float | Sequence[float],
    params: Mapping[str, Any],
    *,
    undo: str | None = None,
    form: Form = "model",
    overwrite: bool = False,
) -> Path:
    """Merge released updates and write what comes out.

    Heads are never merged: what is written has the first update's.

    Args:
        out: Folder to make; it takes its name only when it is whole.
        attack: Name of the attack.
        updates: The release first, then its partners.
        coefficients: One shared coefficient, or one per model.
        params: The attack's hyper-parameters.
        undo: How every update is brought into the base's basis first, if at all (`undo.UNDOS`).
        form: A whole model that transformers loads, or a peft adapter.
        overwrite: Replace a folder that is there.

    Returns:
        The folder.

    Raises:
        UserError: The merge is not possible or has no such form, or the folder is taken.
    """
    refuse_existing(out, overwrite)
    entry = load_attacks().get(attack)
    if entry.needs_data:
        raise UserError(
            f"attack '{attack}' looks at unlabelled rows of every task, which no release holds; "
            "audit with it in attacker.data_attacks, or take another"
        )
    common_base(updates)
    opened = [TaskVector.of(u) if undo is None else undone(u, undo) for u in updates]
    if entry.tool is not None:
        entry.tool.check(opened)
    merged = merge(entry, opened, coefficients, base=updates[0].base, **params)
    weights = (
        entry.shared(coefficients, len(updates))
        if isinstance(coefficients, int | float)
        else tuple(coefficients)
    )
    if form == "adapter":
        check_adapter(attack, updates)
        if undo is not None:
            raise UserError(
                f"undo '{undo}' changes whole weights, which no adapter of the updates' ranks "
                "holds; write the whole model with --as model, or leave undo out"
            )
    release, *partners = updates
    with new_folder(out, overwrite) as folder:
        if form == "adapter":
            write_adapter(folder, attack, updates, weights)
        else:
            write_model(folder, release, merged)
        record = {
            "attack": attack,
            "coefficients": list(weights),
            "params": dict(params),
            **_told(entry, updates, weights, params),
            "undo": undo,
            "head": "of the release, not merged" if release.head else "none",
            "release": {"folder": release.folder.name, "digest": release.digest},
            "partners": [{"folder": p.folder.name, "digest": p.digest} for p in partners],
            "base": release.base.digest,
            "versions": versions(),
            "created": now(),
        }
        write_json(folder / "merge.json", record)
    return out


def _told(
    entry: Attack, updates: Sequence[Update], weights: Sequence[float], params: Mapping[str, Any]
) -> dict[str, Any]:
    """Which library made the merge and what it was told, where one did."""
    if entry.tool is None:
        return {}
    names = [update.folder.name for update in updates]
    return {"tool": entry.tool.recorded(names, weights, params)}


def recorded_base(release: Path) -> str:
    """The base a release says it was trained on.

    Raises:
        UserError: It does not say.
    """
    record, adapter = release / "trap2.json", release / "adapter_config.json"
    named = nested(read_json(record), "recipe", "base") if record.is_file() else None
    if named is None and adapter.is_file():
        named = read_json(adapter).get("base_model_name_or_path")
    if not isinstance(named, str):
        raise UserError(f"{release} does not say which base it was trained on; give --base")
    return named
