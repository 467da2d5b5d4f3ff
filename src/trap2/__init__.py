"""Make fine-tuned weights unmergeable, attack the protection, and report what held.

The names below are the whole public surface; each is imported when it is first used, so that
`import trap2` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trap2.attacks.attack import attack as attack
    from trap2.auditing.audit import audit as audit
    from trap2.protecting.config import Trap2Config as Trap2Config
    from trap2.protecting.protector import Protector as Protector
    from trap2.protecting.trainer import protect_trainer as protect_trainer
    from trap2.update import Update as Update

__version__ = "0.1.0"

_HOMES = {
    "Protector": "trap2.protecting.protector",
    "Trap2Config": "trap2.protecting.config",
    "Update": "trap2.update",
    "attack": "trap2.attacks.attack",
    "audit": "trap2.auditing.audit",
    "protect_trainer": "trap2.protecting.trainer",
}
__all__ = ["Protector", "Trap2Config", "Update", "attack", "audit", "protect_trainer"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'trap2' has no attribute '{name}'; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
