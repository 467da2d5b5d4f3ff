"""A model small enough to work out by hand, its rows, and updates of it."""

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from trap2.attacks.live import LiveModel
from trap2.attacks.unlabelled import Unlabelled


class Block(nn.Module):
    """h -> tanh of a linear map of h, (N, T, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        return torch.tanh(self.linear(h))


class Encoder(nn.Module):
    """Two blocks, one after the other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))

    def forward(self, h: Tensor) -> Tensor:
        for block in self.blocks:
            h = block(h)
        return h


class Classifier(nn.Module):
    """An encoder, the mean over tokens, and a head."""

    def __init__(self, encoder: Encoder, head: Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("head", head)

    def forward(self, x: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        mask = attention_mask.unsqueeze(-1)
        mean = (self.encoder(x) * mask).sum(1) / mask.sum(1)
        return SimpleNamespace(logits=mean @ self.head.T)


FIRST, SECOND = "blocks.0.linear.weight", "blocks.1.linear.weight"
BIAS = "blocks.0.linear.bias"


class World:
    """A live base and, for each of some tasks, rows in front of it and an update."""

    def __init__(self, tasks: int = 2, width: int = 3, rows: int = 20, tokens: int = 4) -> None:
        draw = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw)

        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.encoder = Encoder(width)
        self.live = LiveModel(self.encoder)
        self.x = [normal(rows, tokens, width) for _ in range(tasks)]
        self.mask = [torch.ones(rows, tokens, dtype=torch.long) for _ in range(tasks)]
        for mask in self.mask:
            mask[1::2, -1] = 0  # every other row is padded
        self.models = [Classifier(self.encoder, normal(3, width)) for _ in range(tasks)]
        self.data = [
            Unlabelled(self.live, model, rows, self._batch(task))
            for task, model in enumerate(self.models)
        ]
        shapes = {n: p.shape for n, p in self.encoder.named_parameters()}
        self.updates = [{n: 0.5 * normal(*s) for n, s in shapes.items()} for _ in range(tasks)]

    def _batch(self, task: int):
        def batch(places: Sequence[int]) -> dict[str, Tensor]:
            chosen = list(places)
            return {"x": self.x[task][chosen], "attention_mask": self.mask[task][chosen]}

        return batch

    def weight(self, name: str, delta: Tensor | float = 0.0) -> Tensor:
        return self.encoder.state_dict()[name] + delta

    def tokens(self, task: int) -> Tensor:
        """What goes into the first block on a task's rows, padding left out."""
        return self.x[task][self.mask[task].bool()]

    def after_first(self, task: int, deltas: dict[str, Tensor]) -> Tensor:
        """What goes into the second block at W0 + dW."""
        weight = self.weight(FIRST, deltas.get(FIRST, 0.0))
        bias = self.weight(BIAS, deltas.get(BIAS, 0.0))
        return torch.tanh(self.tokens(task) @ weight.T + bias)

    def logits(self, task: int, deltas: dict[str, Tensor]) -> Tensor:
        state = {f"encoder.{n}": self.weight(n, d) for n, d in deltas.items()}
        rows = {"x": self.x[task], "attention_mask": self.mask[task]}
        return functional_call(self.models[task], state, (), rows).logits
