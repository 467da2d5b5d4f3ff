"""Tasks made from unlabelled texts, for surrogates: something to learn, whatever it is worth.

Each gives every class a text that describes it, which a frozen zero-shot head reads.

`clusters`: which cluster of the base's own embeddings a text lies in, each under the description
of another one, so that there is something to learn. `words`: which of a few words was left out.
`shuffled`: labels drawn at random, which can only be learned by heart.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trap2.errors import UserError
from trap2.registry import Registry

FEWEST = 24
"""Texts without which no pseudo-task is made."""

MOST_CLASSES = 6
ROUNDS = 20
"""Rounds of k-means."""

WORD = re.compile(r"[^\W\d_]\w{2,}")
COMMON = (0.01, 0.2)
"""Of the texts, a word stands in at least and at most so many to be asked for."""

GAP = "..."


@dataclass(frozen=True)
class PseudoTask:
    """Rows of a made-up classification task, and a text that describes each class."""

    texts: list[str]
    labels: list[int]
    descriptions: list[str]


Maker = Callable[[Sequence[str], Tensor, int, torch.Generator], PseudoTask]
"""From texts, their unit embeddings (N, D), the number of classes and a random stream."""

PSEUDO_TASKS: Registry[Maker] = Registry("pseudo-task")


def pseudo_task(
    kind: str, texts: Sequence[str], embeddings: Tensor, drawn: torch.Generator
) -> PseudoTask:
    """Make a task of one kind, with 2 to `MOST_CLASSES` classes.

    Args:
        kind: `clusters`, `words` or `shuffled`.
        texts: Unlabelled texts, N of them.
        embeddings: Their unit embeddings (N, D) by the base.
        drawn: The random stream it is drawn from.

    Raises:
        UserError: There are too few texts.
    """
    if len(texts) < FEWEST:
        raise UserError(
            f"texts has {len(texts)} rows, too few to make tasks of; give {FEWEST} or more"
        )
    classes = int(torch.randint(2, MOST_CLASSES + 1, (), generator=drawn))
    return PSEUDO_TASKS.get(kind)(texts, embeddings, classes, drawn)


def _clusters(
    texts: Sequence[str], embeddings: Tensor, classes: int, drawn: torch.Generator
) -> PseudoTask:
    centres = embeddings[_some(len(texts), 1, drawn)]
    for _ in range(classes - 1):  # far from those before, by k-means++
        distance = (1 - embeddings @ centres.T).amin(1).clamp(min=1e-6)
        centres = torch.cat([centres, embeddings[torch.multinomial(distance, 1, generator=drawn)]])
    for _ in range(ROUNDS):
        labels = (embeddings @ centres.T).argmax(1)
        means = [embeddings[labels == c].mean(0) for c in range(classes)]
        centres = torch.stack(
            [m if m.isfinite().all() else old for m, old in zip(means, centres, strict=True)]
        )
        centres = torch.nn.functional.normalize(centres, dim=1)
    labels = (embeddings @ centres.T).argmax(1)
    typical = (embeddings @ centres.T).argmax(0).roll(1).tolist()
    return PseudoTask([*texts], labels.tolist(), [texts[i] for i in typical])


def _words(
    texts: Sequence[str], embeddings: Tensor, classes: int, drawn: torch.Generator
) -> PseudoTask:
    bags = [dict.fromkeys(WORD.findall(text.lower())) for text in texts]
    counts = Counter(word for bag in bags for word in bag)
    low, high = (share * len(texts) for share in COMMON)
    common = sorted(word for word, n in counts.items() if max(2, low) <= n <= high)
    if len(common) < 2:
        low, high = (100 * share for share in COMMON)
        raise UserError(
            f"texts has {len(common)} words that stand in {low:g} to {high:g} % of its "
            f"{len(texts)} rows, too few to ask for; leave out the kind words, or give more text"
        )
    words = [common[i] for i in _some(len(common), min(classes, len(common)), drawn)]
    rows = []
    for text, bag in zip(texts, bags, strict=True):
        inside = [label for label, word in enumerate(words) if word in bag]
        if len(inside) == 1:
            gapped = re.sub(rf"\b{words[inside[0]]}\b", GAP, text, flags=re.IGNORECASE)
            rows.append((gapped, inside[0]))
    return PseudoTask([text for text, _ in rows], [label for _, label in rows], words)


def _shuffled(
    texts: Sequence[str], embeddings: Tensor, classes: int, drawn: torch.Generator
) -> PseudoTask:
    labels = torch.randint(classes, (len(texts),), generator=drawn).tolist()
    return PseudoTask([*texts], labels, [texts[i] for i in _some(len(texts), classes, drawn)])


def _some(among: int, count: int, drawn: torch.Generator) -> list[int]:
    """Places of `count` of them, each at most once."""
    places: list[int] = torch.randperm(among, generator=drawn)[:count].tolist()
    return places


PSEUDO_TASKS.add("clusters", _clusters)
PSEUDO_TASKS.add("words", _words)
PSEUDO_TASKS.add("shuffled", _shuffled)
