"""DisTaC: give every update another size and distil its skill back, then add them up."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from trap2.attacks.attack import attack
from trap2.attacks.tuning import answers, imitation, tuned
from trap2.attacks.unlabelled import Unlabelled
from trap2.attacks.vectors import TaskVector, by_tensor, weighted_sum


@attack(
    "distac",
    paper="https://arxiv.org/abs/2508.01148",
    grid={"scale": (0.5, 2.0), "steps": (100,), "learning_rate": (3e-4,), "seed": (0,)},
)
def distac(
    updates: Sequence[TaskVector],
    coefficients: Sequence[float],
    *,
    data: Sequence[Unlabelled],
    scale: float,
    steps: int,
    learning_rate: float = 3e-4,
    seed: int = 0,
) -> Iterator[tuple[str, Tensor]]:
    """Re-encoding, then task arithmetic (Yoshida et al. 2026, arXiv 2508.01148).

    Symbols: dW_i update of model i; k = `scale`; x its unlabelled rows; p its answers; c_i
    coefficient.

        dW_i' starts at k dW_i and minimises mean_x KL(p(y|x; W0 + dW_i) || p(y|x; W0 + dW_i'))
        dW    = sum_i c_i dW_i'

    The paper gives updates of unlike size the same one, and may sharpen answers; here every update
    is re-encoded, the protected one at a size of which its trainer did not know. Without steps and
    at scale 1 it is task arithmetic. A model with coefficient 0 is left out.

    Args:
        updates: One task vector per model.
        coefficients: One coefficient per model.
        data: Unlabelled rows of each model.
        scale: Size of the update to start from, as a factor.
        steps: Steps of Adam.
        learning_rate: Of Adam.
        seed: Seed of the order of rows.

    Yields:
        (base tensor name, merged update).
    """

    def encoded(update: TaskVector, rows: Unlabelled) -> TaskVector:
        def work() -> TaskVector:
            start = {name: scale * delta for name, delta in update.items()}
            wanted = answers(rows, dict(update))
            *_, (_, last) = tuned(
                rows,
                start,
                wanted,
                imitation,
                steps=steps,
                learning_rate=learning_rate,
                seed=seed,
            )
            return TaskVector.of({name: delta.detach() for name, delta in last.items()})

        return update.remember(("distac",), work, (rows.serial, scale, steps, learning_rate, seed))

    found = [
        encoded(update, rows) if c else update
        for c, update, rows in zip(coefficients, updates, data, strict=True)
    ]
    for name, deltas in by_tensor(found):
        yield name, weighted_sum(deltas, coefficients)
