"""How deep in a model a tensor sits, by the number of its layer in its name."""

from collections.abc import Iterable


def depths(names: Iterable[str]) -> dict[str, float | None]:
    """Each tensor's place in the stack of layers, 0 for the first layer and 1 for the last.

    The layer is the first number in a name, as in `encoder.layer.3.output.dense.weight`.

    Args:
        names: Names of all tensors.

    Returns:
        Place by name; None for tensors of no layer, such as embeddings.
    """
    layers = {name: _layer(name) for name in names}
    last = max((layer for layer in layers.values() if layer is not None), default=0)
    return {name: None if layer is None else layer / max(1, last) for name, layer in layers.items()}


def _layer(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)
