"""Everything that can be set about the trap; the defaults are the ones the bench chose."""

import math
from dataclasses import dataclass, field
from typing import Any

from trap2.errors import UserError
from trap2.protecting.losses import TRAP_LOSSES
from trap2.registry import Registry
from trap2.scales import ScaleLaw


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


def _grown(since: int, over: int) -> float:
    """Share reached at a step of a linear growth: 0 before it starts, 1 from its end on."""
    return 0.0 if since < 0 else min(1.0, (since + 1) / max(1, over))


PRESETS: Registry[dict[str, Any]] = Registry("preset")
"""Settings by name, as far as they are not the default: see `Trap2Config.preset`."""

PRESETS.add("default", {})
PRESETS.add("all_rows", {"fraction": 1.0, "memory": 0, "cap": 0.0, "ease": 0.0, "spare": 0.0})
PRESETS.add(
    "paper",  # unbounded ascent on all rows, small strength, no warm-up
    {
        "strength": 0.01,
        "loss": "ascent",
        "readout_weight": 0.0,
        "low": 0.05,
        "high": 2.0,
        "band": 0.05,
        "focus": 0.0,
        "weighting": "inverse",
        "fraction": 1.0,
        "memory": 0,
        "cap": 0.0,
        "ease": 0.0,
        "spare": 0.0,
        "warmup": 0,
        "ramp": 0,
    },
)


@dataclass(frozen=True, kw_only=True)
class Trap2Config:
    """Settings of the trap.

    The fields are plain values with a `help` text, so the class goes through transformers'
    `HfArgumentParser` as it is. Steps are optimizer steps.

    Raises:
        UserError: A value is outside its range, or a name is unknown.
    """

    strength: float = _setting(0.3, "weight of the trap (lambda in the paper); 0 is a plain run")
    loss: str = _setting("decoy", "trap loss: see `trap2 list losses`")
    readout_weight: float = _setting(3.0, "weight of the read-out adversary added to the loss")
    cap: float = _setting(
        1.0, "largest norm of the trap's gradient of a tensor, in norms of the nominal one; 0: none"
    )
    ease: float = _setting(
        1.5, "rise of the mean task loss, a factor, from which on the trap is halved; 0: never"
    )
    spare: float = _setting(
        0.25, "in full fine-tuning: share of the tensors, from the input on, left to the task alone"
    )
    low: float = _setting(0.2, "smallest scale the trap is trained at")
    high: float = _setting(1.6, "largest scale the trap is trained at")
    band: float = _setting(0.1, "half-width around scale 1 where no trap is trained")
    near: float = _setting(0.25, "half-width of the neighbourhood of scale 1 drawn from more often")
    focus: float = _setting(0.5, "share of the draws that come from that neighbourhood alone")
    weighting: str = _setting("inverse", "weight of a scale: inverse | inverse_sqrt | uniform")
    fraction: float = _setting(
        0.2,
        "share of each batch's rows in the trap pass; all where batch norm ties them",
    )
    min_rows: int = _setting(
        6, "fewest rows of a step in the trap pass, or tokens that are targets (per process)"
    )
    memory: int = _setting(128, "rows of earlier trap passes the read-out adversary is fitted on")
    scales_per_step: int = _setting(1, "scales per step, each on its own slice of the rows")
    one_pass: bool = _setting(
        False, "trap rows ride in the nominal pass (plain LoRA alone): fewer kernels, more memory"
    )
    warmup: int = _setting(30, "plain steps before the trap starts")
    ramp: int = _setting(60, "steps over which the trap grows to its full strength")
    closing: int = _setting(300, "steps after the ramp over which `focus` grows to its full share")
    surrogates: str = _setting("", "folder of a bank (`trap2 surrogates`): train on merges too")
    surrogate_share: float = _setting(0.5, "share of the trap passes with surrogates beside")
    surrogate_count: int = _setting(
        0, "partners made of the bank: more than it holds are transforms; 0: the bank as it is"
    )
    base_files: str = _setting(
        "", "folder of the base: full fine-tuning holds no copy of it but reads these files"
    )
    scale_seed: int = _setting(0, "seed of the scales")

    def __post_init__(self) -> None:
        TRAP_LOSSES.get(self.loss)
        limits: dict[str, tuple[bool, str]] = {
            "strength": (0 <= self.strength < math.inf, "must be finite and 0 or more"),
            "readout_weight": (0 <= self.readout_weight < math.inf, "must be finite and 0 or more"),
            "cap": (0 <= self.cap < math.inf, "must be finite and 0 or more"),
            "ease": (
                self.ease == 0 or 1 < self.ease < math.inf,
                "must be 0 or greater than 1",
            ),
            "spare": (0 <= self.spare < 1, "must lie in [0, 1)"),
            "fraction": (0 < self.fraction <= 1, "must lie in (0, 1]"),
            "scales_per_step": (self.scales_per_step >= 1, "must be 1 or more"),
            "memory": (self.memory >= 0, "must be 0 or more"),
            "warmup": (self.warmup >= 0, "must be 0 or more"),
            "ramp": (self.ramp >= 0, "must be 0 or more"),
            "closing": (self.closing >= 0, "must be 0 or more"),
            "min_rows": (self.min_rows >= 1, "must be 1 or more"),
            "surrogate_share": (0 < self.surrogate_share <= 1, "must lie in (0, 1]"),
            "surrogate_count": (self.surrogate_count >= 0, "must be 0 or more"),
        }
        for name, (sound, rule) in limits.items():
            if not sound:
                raise UserError(f"{name}={getattr(self, name)} is out of range; it {rule}")
        _ = self.law_at(0)

    def law_at(self, step: int) -> ScaleLaw:
        """The scale law at an optimizer step.

        The trap opens where it is easy, far from scale 1, and closes in on it: scales near 1 ask
        for the opposite of the task almost where the task is learned, and from the start that can
        keep the task from being learned at all.
        """
        return ScaleLaw(
            low=self.low,
            high=self.high,
            band=self.band,
            near=self.near,
            focus=self.focus * _grown(step - self.warmup - self.ramp, self.closing),
            weighting=self.weighting,
        )

    def strength_at(self, step: int) -> float:
        """Weight of the trap at an optimizer step: 0 in the warm-up, then a linear ramp."""
        return self.strength * _grown(step - self.warmup, self.ramp)

    def passes_at(self, step: int) -> int:
        """Trap passes of an optimizer step: none before the trap starts."""
        return self.scales_per_step if self.strength_at(step) > 0 else 0

    def fewest_rows(self, micro_batches: int, targets: float = 1.0) -> int:
        """Fewest rows of one of an optimizer step's micro-batches in the trap pass.

        Args:
            micro_batches: How many there are.
            targets: Of a row, on average: one, or its tokens that are targets.
        """
        return math.ceil(self.min_rows / micro_batches / max(1.0, targets))

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "Trap2Config":
        """A named setting with changes.

        Args:
            name: `default`; `all_rows`, the trap on every row and without a cap; or `paper`, the
                setting of arXiv 2601.21898.
            **changes: What shall differ from it.

        Raises:
            UserError: The name is unknown.
        """
        return cls(**{**PRESETS.get(name), **changes})
