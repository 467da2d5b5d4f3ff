"""Which tensor of one checkpoint is which of another, when they differ by a leading module name.

The same encoder is stored as `encoder.layer.0...` by itself and as `bert.encoder.layer.0...` under
a task head. Everything that compares or merges checkpoints asks this file.
"""

from collections.abc import Iterable

HEAD_MODULES = (
    "classifier",
    "pre_classifier",
    "score",
    "head",
    "classification_head",
    "sequence_summary",
    "logits_proj",
    "qa_outputs",
    "cls_head",
)
"""First module names of task heads: trained per task, released beside the update, never merged."""


def is_head(name: str) -> bool:
    """Whether a tensor belongs to a task head by its name."""
    return any(part in HEAD_MODULES for part in name.split(".")[:2])


def align(names: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """Map names onto known names by keeping, stripping or adding one leading module name.

    The rule that maps most names is used for all of them; on equal counts the simpler rule.

    Args:
        names: Names to map.
        known: Names of the reference checkpoint or model.

    Returns:
        {name: known name} for the names that map, in the order of `names`.
    """
    names, targets = list(names), dict.fromkeys(known)
    strips = dict.fromkeys(name.split(".", 1)[0] + "." for name in names)
    adds = dict.fromkeys(target.split(".", 1)[0] + "." for target in targets)
    best = {name: name for name in names if name in targets}
    for prefix in strips:
        mapped = {
            name: name[len(prefix) :]
            for name in names
            if name.startswith(prefix) and name[len(prefix) :] in targets
        }
        best = mapped if len(mapped) > len(best) else best
    for prefix in adds:
        mapped = {name: prefix + name for name in names if prefix + name in targets}
        best = mapped if len(mapped) > len(best) else best
    return best
