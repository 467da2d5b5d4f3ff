"""NuSLERP: SLERP of two updates instead of two whole models, and at a length of one's choice."""

import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from trap2.attacks.attack import attack
from trap2.attacks.slerp import ends, interpolate
from trap2.attacks.vectors import TaskVector, by_tensor
from trap2.errors import UserError


@attack(
    "nuslerp",
    paper="https://doi.org/10.1145/325165.325242",
    grid={"scale": (1.0, 1.4)},
    tiers=("T1", "T2"),
    models=(2, 2),
    coefficients=(0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    spread=ends,
)
def nuslerp(
    updates: Sequence[TaskVector], coefficients: Sequence[float], *, scale: float = 1.0
) -> Iterator[tuple[str, Tensor]]:
    """Spherical interpolation of two updates, mergekit's NuSLERP with a base.

    Symbols: dW_1, dW_2 the updates of one tensor, flattened; t = c_2 = 1 - c_1 the place on the way
    from the first to the second; w the angle between them.

        dW = scale * (sin((1 - t) w) / sin(w) * dW_1 + sin(t w) / sin(w) * dW_2)

    Whole weights of one base are so close that `slerp` is nearly the chord; updates are often at
    right angles, so that at t = 1/2 each keeps 0.71 of itself and, at scale 1.4, all. Linear where
    |cos(w)| > 0.9995 or an update is zero.

    Args:
        updates: Two task vectors.
        coefficients: (1 - t, t).
        scale: Factor of the whole.

    Yields:
        (base tensor name, merged update).

    Raises:
        UserError: The coefficients do not add up to 1.
    """
    if not math.isclose(math.fsum(coefficients), 1.0, abs_tol=1e-6):
        raise UserError(
            f"nuslerp got the coefficients {tuple(coefficients)}, which do not add up to 1; "
            "give 1 - t and t"
        )
    for name, deltas in by_tensor(updates):
        a, b = (delta.double() for delta in deltas)
        yield name, scale * interpolate(a, b, coefficients[1]).float()
