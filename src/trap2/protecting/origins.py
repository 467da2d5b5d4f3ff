"""Where trained parameters started: a copy in memory, or the base's own files.

A copy takes as much memory as the parameters, or half, where their values are those of a base in
half precision; files take time, in every trap pass. Only a tensor that a file holds bit for bit is
read from there.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trap2.checkpoint import Checkpoint
from trap2.errors import UserError
from trap2.naming import align
from trap2.protecting.wrappers import is_sharded, local

Origin = Callable[[], Tensor]
"""Gives the values, on the parameter's device, in its precision or in one that holds them too."""


def copy_of(tensor: Tensor) -> Origin:
    """A copy of a tensor's values now; of a sharded one, of this process's part."""
    kept = _narrowest(local(tensor).detach())
    return lambda: kept


def _narrowest(values: Tensor) -> Tensor:
    """A copy in half precision where that loses nothing."""
    for dtype in (torch.bfloat16, torch.float16):
        half = values.to(dtype)
        if half.nbytes < values.nbytes and torch.equal(half.to(values.dtype), values):
            return half
    return values.clone()


def origins(parameters: Sequence[tuple[str, Tensor]], folder: str) -> list[Origin]:
    """The starts of named parameters: their values now.

    Args:
        parameters: Names and parameters; a sharded one is always copied.
        folder: Folder of the base's safetensors; "" for copies of everything.

    Raises:
        UserError: The folder has no such files, or they hold none of the parameters.
    """
    if not folder:
        return [copy_of(parameter) for _, parameter in parameters]
    files = Checkpoint(folder)
    stored = align(files.names, [name for name, _ in parameters])
    places = {name: place for place, name in stored.items()}
    found = [_in_file(files, places.get(name), parameter) for name, parameter in parameters]
    if not any(found):
        raise UserError(
            f"base_files={folder} holds none of the weights that training starts from; give the "
            "folder that the model was loaded from"
        )
    return [
        origin or copy_of(parameter)
        for origin, (_, parameter) in zip(found, parameters, strict=True)
    ]


def _in_file(files: Checkpoint, name: str | None, parameter: Tensor) -> Origin | None:
    """The start of a parameter in a file; None if it is not there, or a shard, or another."""
    if name is None or is_sharded(parameter):
        return None
    device, dtype, stamp = parameter.device, parameter.dtype, files.stamp(name)

    def read() -> Tensor:
        if files.stamp(name) != stamp:
            raise UserError(
                f"{files.folder} changed while a model was trained from it (base_files); leave the "
                "base alone until training has ended, or set base_files to a copy of it"
            )
        return files.tensor(name, mapped=True).to(device, dtype)

    return read if torch.equal(read(), parameter) else None
