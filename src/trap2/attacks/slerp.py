"""SLERP: walk from one model's weights to another's along a great circle instead of a chord."""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from trap2.attacks.attack import attack
from trap2.attacks.vectors import TaskVector, by_tensor
from trap2.errors import UserError

COLINEAR = 0.9995
"""|cos| above which the arc is a chord to float precision; mergekit's threshold."""


def ends(t: float, count: int) -> tuple[float, ...]:
    """The two coefficients 1 - t and t; `count` is 2."""
    return (1 - t, t)


@attack(
    "slerp",
    paper="https://doi.org/10.1145/325165.325242",
    tiers=("T1", "T2"),
    models=(2, 2),
    coefficients=(0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    spread=ends,
)
def slerp(
    updates: Sequence[TaskVector], coefficients: Sequence[float], *, base: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Spherical interpolation of the full weights (Shoemake 1985, doi 10.1145/325165.325242).

    Symbols: W0 base tensor; a = W0 + dW_1, b = W0 + dW_2 the two models' tensors, flattened;
    t = c_2 = 1 - c_1 the place on the way from a to b; w the angle between a and b.

        W  = sin((1 - t) w) / sin(w) * a + sin(t w) / sin(w) * b      cos(w) = a.b / (|a| |b|)
        dW = W - W0

    Conventions as in mergekit: tensor by tensor, a and b normalised for the angle only, and linear
    interpolation where |cos(w)| > 0.9995, which most pairs of one base are. A zero tensor has no
    angle and is interpolated linearly too (mergekit takes a right angle). In float64 throughout.

    Args:
        updates: Two task vectors.
        coefficients: (1 - t, t).
        base: The base tensors.

    Yields:
        (base tensor name, merged update).

    Raises:
        UserError: The coefficients do not add up to 1.
    """
    if not math.isclose(math.fsum(coefficients), 1.0, abs_tol=1e-6):
        raise UserError(
            f"slerp got the coefficients {tuple(coefficients)}, which do not add up to 1; "
            "give 1 - t and t"
        )
    for name, deltas in by_tensor(updates):
        origin = base[name].double()
        a, b = (origin + delta for delta in deltas)
        yield name, (interpolate(a, b, coefficients[1]) - origin).float()


def interpolate(a: Tensor, b: Tensor, t: float) -> Tensor:
    """The tensor at t on the arc from a (t = 0) to b (t = 1).

    Args:
        a: Start.
        b: End, of the same shape.
        t: Place on the way.
    """
    norms = float(a.norm() * b.norm())
    cos = float(torch.sum(a * b)) / norms if norms else 1.0
    if abs(cos) > COLINEAR:
        return (1 - t) * a + t * b
    w = math.acos(cos)
    return (math.sin((1 - t) * w) * a + math.sin(t * w) * b) / math.sin(w)
