"""One coefficient for each third of the layers, on top of the models' own."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from trap2.attacks.attack import attack
from trap2.attacks.depth import depths
from trap2.attacks.vectors import TaskVector, by_tensor, weighted_sum


@attack(
    "layer_groups",
    paper="https://arxiv.org/abs/2310.02575",
    grid={"early": (0.5, 1.0, 1.5), "late": (0.5, 1.0, 1.5)},
)
def layer_groups(
    updates: Sequence[TaskVector], coefficients: Sequence[float], *, early: float, late: float
) -> Iterator[tuple[str, Tensor]]:
    """Task arithmetic by groups of layers, after the layer-wise coefficients of arXiv 2310.02575.

    Symbols: dW_i update of model i; c_i its coefficient; d depth of the tensor's layer, 0 for the
    first layer and 1 for the last.

        f(d) = early for d < 1/3,  1 for 1/3 <= d <= 2/3,  late for d > 2/3
        dW   = f(d) * sum_i c_i dW_i

    AdaMerging learns one coefficient per layer from unlabelled rows; three groups and a grid need
    none. Tensors of no layer, such as embeddings, count as early. One model at c = 1 and
    early = late = 1 is that model.

    Args:
        updates: One task vector per model.
        coefficients: One coefficient per model.
        early: Factor of the first third of the layers.
        late: Factor of the last third.

    Yields:
        (base tensor name, merged update).
    """
    places = depths(name for update in updates for name in update)
    for name, deltas in by_tensor(updates):
        depth = places[name] or 0.0
        factor = early if depth < 1 / 3 else late if depth > 2 / 3 else 1.0
        yield name, weighted_sum(deltas, [factor * c for c in coefficients])
