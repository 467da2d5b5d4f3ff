"""A merge as a peft adapter: LoRA updates added up are one LoRA update of all their ranks.

Symbols: c_i coefficient; s_i scaling, A_i and B_i factors of model i.

    sum_i c_i s_i B_i A_i = [c_1 s_1 B_1 | c_2 s_2 B_2 | ...] [A_1; A_2; ...]

It is exact. No other merge is a product of so low a rank, so only task arithmetic can be written.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from trap2.adapters import PEFT_PREFIX
from trap2.errors import UserError
from trap2.files import read_json, write_json
from trap2.update import Factors, Update

KEPT = ("auto_mapping", "task_type", "modules_to_save", "base_model_name_or_path", "fan_in_fan_out")
"""What the merged adapter's settings take from the release's."""


def write_adapter(
    folder: Path, attack: str, updates: Sequence[Update], coefficients: Sequence[float]
) -> None:
    """Fill a folder with the merged adapter; the head is the first update's.

    Args:
        folder: Where; it exists and is empty.
        attack: Name of the attack.
        updates: The release and its partners.
        coefficients: One coefficient per model.

    Raises:
        UserError: The merge is not the product of two thin factors.
    """
    check_adapter(attack, updates)
    release, *_ = updates
    names = dict.fromkeys(name for update in updates for name in update.shared)
    stacked = {name: _stacked(name, updates, coefficients) for name in names}
    rank = max(len(factors.A) for factors in stacked.values())
    tensors = {PEFT_PREFIX + name: tensor for name, tensor in release.head.items()}
    for name, found in stacked.items():
        module = PEFT_PREFIX + release.prefix + name.removesuffix(".weight")
        for suffix, tensor in zip(found.suffixes, _filled(found, rank), strict=True):
            tensors[f"{module}.{suffix}"] = tensor.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = [release.prefix + name.removesuffix(".weight") for name in names]
    write_json(folder / "adapter_config.json", _settings(release, targets, rank))


def check_adapter(attack: str, updates: Sequence[Update]) -> None:
    """Refuse what is not the product of two thin factors, before anything is done.

    Raises:
        UserError: It is another attack than task arithmetic, or an update is not of LoRA alone.
    """
    remedy = "write the whole model with --as model"
    if attack != "task_arithmetic":
        raise UserError(
            f"attack '{attack}' gives an update of full rank, which no adapter of the updates' "
            f"ranks holds; {remedy}, or use task_arithmetic"
        )
    orientations = set()
    for update in updates:
        whole = [name for name in update.shared if update.factors(name) is None]
        if whole:
            raise UserError(
                f"{update.folder} changes '{whole[0]}' as a whole and not by LoRA, which an "
                f"adapter cannot add up; {remedy}"
            )
        config = read_json(update.folder / "adapter_config.json")
        orientations.add(bool(config.get("fan_in_fan_out")))
    if len(orientations) > 1:
        raise UserError(f"the adapters store their factors in different orientations; {remedy}")


def _stacked(name: str, updates: Sequence[Update], coefficients: Sequence[float]) -> Factors:
    """The factors of the sum of the updates of one tensor; scaling is in B."""
    found = [
        (coefficient * factors.scaling, factors)
        for update, coefficient in zip(updates, coefficients, strict=True)
        if name in update.shared and (factors := update.factors(name)) is not None
    ]
    A = torch.cat([factors.A for _, factors in found], dim=0)
    B = torch.cat([scale * factors.B for scale, factors in found], dim=1)
    return Factors(A, B, 1.0, found[0][1].suffixes)


def _filled(found: Factors, rank: int) -> tuple[Tensor, Tensor]:
    """Both factors with zeros up to the rank that all modules of an adapter share."""
    missing = rank - len(found.A)
    rows = [0, 0] * (found.A.ndim - 1) + [0, missing]
    columns = [0, 0] * (found.B.ndim - 2) + [0, missing]
    return pad(found.A, rows), pad(found.B, columns)


def _settings(release: Update, targets: list[str], rank: int) -> dict[str, Any]:
    own = read_json(release.folder / "adapter_config.json")
    return {
        "peft_type": "LORA",
        **{key: own[key] for key in KEPT if key in own},
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": targets,
    }
