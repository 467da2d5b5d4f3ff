"""Where numbers come from: versions, the machine, the time."""

import os
import platform
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version

from trap2.errors import UserError

LIBRARIES = ("trap2", "torch", "transformers", "peft", "safetensors", "datasets", "scikit-learn")


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries a result depends on."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def installed(library: str) -> str:
    """The version of a library.

    Raises:
        UserError: It is not installed.
    """
    try:
        return version(library)
    except PackageNotFoundError as error:
        raise UserError(f"{library} is not installed; pip install {library}") from error


def machine() -> dict[str, str]:
    """What the work ran on, without names that identify it."""
    import torch

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": card,
    }


def now() -> str:
    """UTC, to the second, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
