"""Suites: attackers that stay what they are, so that two audits compare by a name.

A suite fixes everything that decides which merges are tried: the attacks, the values of their
coefficients and parameters, what is done with one coefficient per model, and how the search goes on
from there; for attackers who look at rows or train on them, how many rows, steps and at which rate.
Rows to choose by and the share the partners must keep stay settings of the audit; the record holds
them.

A suite is never changed: another choice is another version, under a name of its own.
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

from trap2.errors import UserError
from trap2.registry import did_you_mean

SUM = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.25, 1.5, 2.0)
"""Coefficients for merges that add up: the updates stay at about their coefficient's scale."""

MEAN = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
"""Coefficients for merges that average: each update stays well below its coefficient's scale."""

WAY = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Places on the way from one model to another."""


@dataclass(frozen=True)
class Trial:
    """One attack of a suite.

    Attributes:
        attack: Its name.
        coefficients: Values of the shared coefficient.
        grid: Values of its own parameters.
        per_model: Whether it is also tried with one coefficient per model (T3).
    """

    attack: str
    coefficients: tuple[float, ...]
    grid: tuple[tuple[str, tuple[float, ...]], ...] = ()
    per_model: bool = False


def _grids(trials: tuple[Trial, ...]) -> dict[str, dict[str, list[float]]]:
    return {t.attack: {key: list(values) for key, values in t.grid} for t in trials if t.grid}


@dataclass(frozen=True)
class Suite:
    """A frozen attacker who has the weights alone, T1 to T3.

    Attributes:
        name: What it is called; a changed suite has another name.
        trials: The attacks, in the order in which they are tried.
        t3_values: Coefficients tried for each model in T3.
        t3_starts: Coefficients of the partners beside the release at 1, from which T3 starts.
        t3_sweeps: Passes of coordinate descent.
        refine: Rounds of looking halfway between the best mixtures and their neighbours.
    """

    name: str
    trials: tuple[Trial, ...]
    t3_values: tuple[float, ...]
    t3_starts: tuple[float, ...]
    t3_sweeps: int
    refine: int

    def settings(self) -> dict[str, Any]:
        """What it fixes, as the keys of `attacker` in an audit."""
        return {
            "attacks": [trial.attack for trial in self.trials],
            "coefficients": {trial.attack: list(trial.coefficients) for trial in self.trials},
            "grids": _grids(self.trials),
            "t3_attacks": [trial.attack for trial in self.trials if trial.per_model],
            "t3_values": list(self.t3_values),
            "t3_starts": list(self.t3_starts),
            "t3_sweeps": self.t3_sweeps,
            "refine": self.refine,
            "budget": None,
        }


@dataclass(frozen=True)
class DataSuite:
    """A frozen attacker who also has unlabelled rows, T4.

    Attributes:
        name: What it is called; a changed suite has another name.
        trials: The attacks, in the order in which they are tried.
        unlabelled_rows: Rows of every task that they look at.
        refine: Rounds of looking halfway between the best mixtures and their neighbours.
    """

    name: str
    trials: tuple[Trial, ...]
    unlabelled_rows: int
    refine: int

    def settings(self) -> dict[str, Any]:
        """What it fixes, as the keys of `attacker` in an audit."""
        return {
            "attacks": [],
            "t3_attacks": [],
            "data_attacks": [trial.attack for trial in self.trials],
            "coefficients": {trial.attack: list(trial.coefficients) for trial in self.trials},
            "grids": _grids(self.trials),
            "unlabelled_rows": self.unlabelled_rows,
            "refine": self.refine,
            "budget": None,
        }


@dataclass(frozen=True)
class RecoverySuite:
    """A frozen attacker who trains on labelled rows, T5.

    Attributes:
        name: What it is called; a changed suite has another name.
        methods: How it trains, references included.
        rows: Labelled rows of each budget.
        steps: Training steps of each budget.
        learning_rate: Of Adam.
        coefficients: Shared coefficients of its merges.
        refine: Rounds of refining the partners' own merge, which it is measured against.
        trials: None: what it does is no merge of a grid.
    """

    name: str
    methods: tuple[str, ...]
    rows: tuple[int, ...]
    steps: tuple[int, ...]
    learning_rate: float
    coefficients: tuple[float, ...]
    refine: int
    trials: tuple[Trial, ...] = ()

    def settings(self) -> dict[str, Any]:
        """What it fixes, as the keys of `attacker` in an audit."""
        return {
            "attacks": [],
            "t3_attacks": [],
            "data_attacks": [],
            "coefficients": {"task_arithmetic": list(SUM)},
            "recovery": list(self.methods),
            "recovery_rows": list(self.rows),
            "recovery_steps": list(self.steps),
            "recovery_learning_rate": self.learning_rate,
            "recovery_coefficients": list(self.coefficients),
            "refine": self.refine,
            "budget": None,
        }


QUICK = Suite(
    name="quick",
    trials=(
        Trial("task_arithmetic", (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 1.2), per_model=True),
        Trial("ties", (0.0, 1.0, 1.5, 2.0, 3.0), (("density", (0.2,)),)),
        Trial("dare_ties", (0.0, 1.0, 1.5, 2.0, 3.0), (("drop", (0.5,)), ("seed", (0,)))),
        Trial("slerp", (0.3, 0.5, 0.7)),
    ),
    t3_values=(0.3, 0.5, 0.7, 1.0),
    t3_starts=(0.3, 0.6),
    t3_sweeps=1,
    refine=0,
)
"""For development, some minutes for a small encoder: no evidence that a protection holds."""

STANDARD_V1 = Suite(
    name="standard-v1",
    trials=(
        Trial("task_arithmetic", SUM, per_model=True),
        Trial("ties", MEAN, (("density", (0.1, 0.2, 0.5, 1.0)),), per_model=True),
        Trial("ties_sum", SUM[::2], (("density", (0.1, 0.2, 0.5, 1.0)),), per_model=True),
        Trial("dare_ties", MEAN, (("drop", (0.5, 0.9)), ("seed", (0, 1)))),
        Trial("dare_linear", SUM[::2], (("drop", (0.5, 0.9)), ("seed", (0, 1)))),
        Trial("della", MEAN, (("density", (0.2, 0.5)), ("epsilon", (0.15,)), ("seed", (0, 1)))),
        Trial("breadcrumbs", SUM[::2], (("density", (0.15, 0.5)), ("gamma", (0.01,)))),
        Trial("consensus", SUM[::2], (("strictness", (0.2, 0.4)), ("votes", (1, 2)))),
        Trial("pcb", MEAN, (("ratio", (0.1, 0.2)),)),
        Trial("equal_norms", SUM[::2]),
        Trial("lines", SUM[::2], (("first", (0.3, 0.6, 1.5)),), per_model=True),
        Trial("layer_groups", SUM[::2], (("early", (0.5, 1.0, 1.5)), ("late", (0.5, 1.0, 1.5)))),
        Trial("slerp", WAY),
        Trial("nuslerp", WAY, (("scale", (1.0, 1.4)),)),
        Trial("karcher", MEAN, per_model=True),
        Trial("model_stock", (0.0, 0.5, 1.0, 1.5, 2.0, 4.0, 8.0, 16.0, 32.0)),
        Trial("tsv", SUM, per_model=True),
        Trial("wudi", SUM[::2], (("pull", (0.003, 0.03, 0.3)),)),
        Trial("iso_c", MEAN),
        Trial("iso_cts", MEAN, (("common", (0.5, 0.8)),)),
        Trial("cart", MEAN, (("rank_share", (0.08, 0.32)), ("weight", (1.0,)))),
        Trial("ties_knots", MEAN, (("density", (0.2, 1.0)),)),
        Trial("ties_core", MEAN, (("density", (0.2, 1.0)),)),
    ),
    t3_values=(0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.25, 1.6, 2.0, 3.0),
    t3_starts=(0.2, 0.4, 0.6, 0.8),
    t3_sweeps=2,
    refine=2,
)
"""Every method that needs weights alone, T1 to T3: hours. Iso-C, Iso-CTS and CART are not in T3:
they decompose again for every choice of coefficients, up to half a minute a merge where updates are
of full rank."""

DATA_V1 = DataSuite(
    name="data-v1",
    trials=(
        Trial("regmean", MEAN, (("alpha", (0.1, 0.5, 0.9, 1.0)),)),
        Trial("regmean_pp", MEAN, (("alpha", (0.9, 1.0)),)),
        Trial("chain_of_merges", MEAN),
        Trial("fisher", MEAN, (("seed", (0,)),)),
        Trial(
            "adamerging",
            (0.0, 0.3, 0.6, 1.0),
            (("layerwise", (False, True)), ("steps", (100, 300)), ("learning_rate", (0.01,))),
        ),
        Trial(
            "prodistill",
            (0.0, 0.3, 0.6, 1.0),
            (("steps", (100,)), ("learning_rate", (0.01, 0.1))),
        ),
        Trial(
            "distac",
            SUM[::2],
            (
                ("scale", (0.5, 2.0)),
                ("steps", (100, 300)),
                ("learning_rate", (3e-4,)),
                ("seed", (0,)),
            ),
        ),
    ),
    unlabelled_rows=100,
    refine=1,
)
"""Every method that looks at unlabelled rows, 100 of each task; many train for a merge."""

RECOVERY_V1 = RecoverySuite(
    name="recovery-v1",
    methods=("probe", "finetune_before", "finetune_after", "distil"),
    rows=(30, 100),
    steps=(30, 100, 300),
    learning_rate=5e-5,
    coefficients=(0.3, 0.5, 0.7, 1.0),
    refine=2,
)
"""Every attacker who trains, with budgets from 30 rows and 30 steps up, beside distillation."""

_T3 = {key: getattr(STANDARD_V1, key) for key in ("t3_values", "t3_starts", "t3_sweeps", "refine")}

MERGEKIT_V1 = Suite(
    name="mergekit-v1",
    trials=(
        Trial("mergekit_linear", SUM[::2], per_model=True),
        Trial("mergekit_task_arithmetic", SUM[::2]),
        Trial("mergekit_ties", MEAN, (("density", (0.2, 0.5, 1.0)),), per_model=True),
        Trial("mergekit_dare_ties", SUM[::2], (("density", (0.1, 0.5)), ("seed", (0, 1)))),
        Trial("mergekit_dare_linear", SUM[::2], (("density", (0.1, 0.5)), ("seed", (0, 1)))),
        Trial("mergekit_breadcrumbs", SUM[::2], (("density", (0.15, 0.5)), ("gamma", (0.01,)))),
        Trial(
            "mergekit_breadcrumbs_ties", SUM[::2], (("density", (0.15, 0.5)), ("gamma", (0.01,)))
        ),
        Trial(
            "mergekit_della",
            MEAN,
            (("density", (0.2, 0.5)), ("seed", (0,)), ("epsilon", (0.15,))),
        ),
        Trial(
            "mergekit_della_linear",
            SUM[::2],
            (("density", (0.2, 0.5)), ("seed", (0,)), ("epsilon", (0.15,))),
        ),
        Trial("mergekit_slerp", WAY),
        Trial("mergekit_nuslerp", WAY),
        Trial("mergekit_multislerp", MEAN, per_model=True),
        Trial("mergekit_karcher", MEAN),
        Trial("mergekit_model_stock", (0.0, 0.5, 1.0, 1.5, 2.0, 4.0, 8.0, 16.0, 32.0)),
        Trial("mergekit_nearswap", SUM[::2], (("t", (1e-4, 1e-3)),)),
        Trial("mergekit_arcee_fusion", SUM[::2]),
        Trial("mergekit_sce", MEAN, (("select_topk", (0.2, 1.0)),)),
        Trial("mergekit_ram", MEAN),
        Trial("mergekit_ramplus_tl", MEAN, (("r", (0.1,)), ("alpha", (0.2,)))),
    ),
    **_T3,
)
"""Every method of mergekit that merges models of one base, made by mergekit itself."""

PEFT_V1 = Suite(
    name="peft-v1",
    trials=(
        Trial("peft_cat", SUM, per_model=True),
        Trial("peft_linear", SUM, per_model=True),
        Trial("peft_ties", MEAN, (("density", (0.2, 0.5, 1.0)),), per_model=True),
        Trial("peft_dare_linear", SUM[::2], (("density", (0.1, 0.5)), ("seed", (0, 1)))),
        Trial("peft_dare_ties", MEAN, (("density", (0.1, 0.5)), ("seed", (0, 1)))),
        Trial("peft_magnitude_prune", SUM[::2], (("density", (0.2, 0.5)),)),
        Trial("peft_svd", SUM[::2], (("rank", (0,)),)),
        Trial("peft_ties_svd", MEAN, (("density", (0.2, 0.5, 1.0)), ("rank", (0,)))),
        Trial(
            "peft_dare_linear_svd",
            SUM[::2],
            (("density", (0.1, 0.5)), ("seed", (0, 1)), ("rank", (0,))),
        ),
        Trial(
            "peft_dare_ties_svd", MEAN, (("density", (0.1, 0.5)), ("seed", (0, 1)), ("rank", (0,)))
        ),
        Trial("peft_magnitude_prune_svd", SUM[::2], (("density", (0.2, 0.5)), ("rank", (0,)))),
    ),
    **_T3,
)
"""Every combination type of peft's `add_weighted_adapter`; for LoRA releases."""

AnySuite: TypeAlias = Suite | DataSuite | RecoverySuite
SUITES: dict[str, AnySuite] = {
    suite.name: suite for suite in (QUICK, STANDARD_V1, DATA_V1, RECOVERY_V1, MERGEKIT_V1, PEFT_V1)
}


def suite(name: str) -> AnySuite:
    """Look up a suite.

    Raises:
        UserError: Nothing has that name.
    """
    if name not in SUITES:
        known = list(SUITES)
        raise UserError(
            f"no suite is called '{name}';{did_you_mean(name, known)} known: {', '.join(known)}"
        )
    return SUITES[name]
