"""Everything that would make protection silently wrong, found at once, before the first step."""

from collections.abc import Iterator

from torch import nn

from trap2.adapters import adapter_refusals
from trap2.errors import Unsupported
from trap2.protecting.tuners import Adapter, inner_name


def check(model: nn.Module, adapter: Adapter) -> None:
    """Refuse a model with an adapter that could not be scaled, or released, exactly.

    Raises:
        Unsupported: With all that is in the way, each with its reason and its remedy.
    """
    found = list(problems(model, adapter))
    if len(found) > 1:
        found = [f"({i}) {problem}" for i, problem in enumerate(found, start=1)]
    if found:
        raise Unsupported(f"protection would not be exact: {'; '.join(found)}")


def problems(model: nn.Module, adapter: Adapter) -> Iterator[str]:
    """What is in the way, each with its reason and its remedy; nothing without an adapter."""
    if not adapter:
        return
    reasons = [reason for config in adapter.settings for reason in adapter_refusals(config)]
    if reasons:
        yield (
            f"the adapter uses {', and '.join(reasons)}: use one of those in docs/adapters.md, or "
            "train the model without an adapter"
        )
    if len(adapter.names) > 1:
        yield (
            f"{len(adapter.names)} adapters are active at once ({', '.join(adapter.names)}) and a "
            "release holds one: activate one with set_adapter"
        )
    merged = [name for layer in adapter.layers for name in layer.merged_adapters]
    if merged:
        yield f"adapter '{merged[0]}' is merged into the base: call unmerge_adapter() first"
    yield from _tied(model, adapter)
    strays = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and adapter.role(name, parameter) == "stray"
    ]
    if strays:
        more = f" (and {len(strays) - 1} more)" if len(strays) > 1 else ""
        yield (
            f"'{strays[0]}'{more} is trained beside the adapter and is neither part of it nor of a "
            "task head: freeze it, or list its module in modules_to_save"
        )


def _tied(model: nn.Module, adapter: Adapter) -> Iterator[str]:
    """Adapted or wholly saved modules that share a weight with another module."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(name)
    for name, base in adapter.replaced(model):
        names = [holder for p in base.parameters() for holder in holders[id(p)]]
        others = [other for other in names if not f"{other}.".startswith(f"{name}.")]
        if others:
            yield (
                f"the adapter is on '{inner_name(name)}', which shares its weight with "
                f"'{inner_name(others[0])}', so that a merge changes both: leave it out of the "
                "adapter, or untie them (tie_word_embeddings=False) before adding it"
            )
