"""The figures, drawn from the record; the only package that knows matplotlib."""

from collections.abc import Callable

from trap2.reporting.plots.attacks import attacks, relabelling
from trap2.reporting.plots.canvas import Drawing, save, svg
from trap2.reporting.plots.mixtures import coefficients, frontier
from trap2.reporting.plots.recovery import recovery
from trap2.reporting.plots.scale import accuracy, loss
from trap2.reporting.plots.summary import summary
from trap2.schema import Report

__all__ = ["FIGURES", "Drawing", "save", "summary", "svg"]

FIGURES: dict[str, Callable[[Report], Drawing | None]] = {
    "summary": summary,
    "accuracy": accuracy,
    "loss": loss,
    "attacks": attacks,
    "relabelling": relabelling,
    "coefficients": coefficients,
    "frontier": frontier,
    "recovery": recovery,
}
"""Every figure by name: a function from the record to a `Drawing`, or None if it holds nothing."""
