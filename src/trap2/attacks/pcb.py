"""PCB: let the entries of the updates compete, within a model and between models."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trap2.attacks.attack import attack
from trap2.attacks.ties import COEFFICIENTS
from trap2.attacks.vectors import TaskVector, by_tensor, weighted_sum
from trap2.errors import UserError

CLIPPED = 1e-4
"""Share of the largest and of the smallest entries of an update that are brought into line."""


@attack(
    "pcb",
    paper="https://arxiv.org/abs/2410.02396",
    grid={"ratio": (0.1, 0.2, 0.5)},
    coefficients=COEFFICIENTS,
)
def pcb(
    updates: Sequence[TaskVector], coefficients: Sequence[float], *, ratio: float
) -> Iterator[tuple[str, Tensor]]:
    """Parameter competition balancing (Du et al. 2024, arXiv 2410.02396).

    Symbols: dW_i update of model i; c_i its coefficient, w_i = c_i / c its share of the largest one
    c; T_i = w_i dW_i; N number of models with c_i != 0; all minima, maxima and shares are over
    all entries that an update has.

        a_i = |T_i| with its largest and smallest 0.01 % clipped
        x_i = (a_i - min a_i) / (max a_i - min a_i)
        b_i = exp(N x_i^2) tanh(T_i sum_j T_j)
        g_i = (b_i - l_i) / (max b_i - l_i), at least 0      l_i: smallest of the top `ratio` of b_i
        dW  = c * sum_i g_i sign(T_i) a_i / sum_i g_i        0 where no g_i is above 0

    Large entries win within a model, entries that agree with the other models between them. A model
    with one coefficient of its own enters as c_i dW_i. One model at c = 1 is that model where
    g is above 0 and nothing is clipped.

    Args:
        updates: One task vector per model.
        coefficients: One coefficient per model.
        ratio: Share of the entries of each update that take part, 0 < ratio <= 1.

    Yields:
        (base tensor name, merged update).

    Raises:
        UserError: The ratio is not in (0, 1].
    """
    if not 0 < ratio <= 1:
        raise UserError(f"ratio={ratio} lets no entry compete; use 0 < ratio <= 1, such as 0.1")
    unit = max(coefficients, key=abs)
    active = [place for place, c in enumerate(coefficients) if c and len(updates[place])]
    members = [updates[place] for place in active]
    shares = [coefficients[place] / unit for place in active]
    serials = tuple(member.serial for member in members)
    bars = (
        members[0].remember(
            ("pcb", ratio), lambda: _bars(members, shares, ratio), (*serials, *shares)
        )
        if members
        else []
    )
    for name, every in by_tensor(updates):
        deltas = [every[place] for place in active]
        merged, total = torch.zeros_like(every[0]), torch.zeros_like(every[0])
        for place, score in enumerate(_scores(members, deltas, shares)):
            low, high = bars[place]
            gain = ((score - low) / max(high - low, torch.finfo(score.dtype).tiny)).clamp_(min=0)
            floor, ceiling = _clip(members[place])
            sizes = deltas[place].abs().clamp(floor, ceiling) * shares[place]
            merged += gain * deltas[place].sign() * sizes
            total += gain
        yield name, unit * torch.where(total > 0, merged / total.clamp(min=1e-12), 0.0)


def _scores(
    members: Sequence[TaskVector], deltas: Sequence[Tensor], shares: Sequence[float]
) -> Iterator[Tensor]:
    """The b_i of one tensor, one after another."""
    if not deltas:
        return
    total = weighted_sum(deltas, shares)
    for member, delta, share in zip(members, deltas, shares, strict=True):
        floor, ceiling = _clip(member)
        spread = ceiling - floor or 1.0
        x = (delta.abs().clamp(floor, ceiling) - floor) / spread
        yield (len(deltas) * x.square()).exp() * (share * delta * total).tanh()


def _clip(member: TaskVector) -> tuple[float, float]:
    """The magnitudes between which an update is clipped; remembered."""

    def work() -> tuple[float, float]:
        sizes = torch.cat([member[name].abs().flatten() for name in member])
        cut = int(CLIPPED * len(sizes))
        low, high = sizes.kthvalue(1 + cut).values, sizes.kthvalue(len(sizes) - cut).values
        return float(low), float(high)

    return member.remember(("pcb clip",), work)


def _bars(
    members: Sequence[TaskVector], shares: Sequence[float], ratio: float
) -> list[tuple[float, float]]:
    """For each model, the smallest and the largest of its scores that take part."""
    found: list[list[Tensor]] = [[] for _ in members]
    for name, deltas in by_tensor(members):
        for place, score in enumerate(_scores(members, deltas, shares)):
            if name in members[place]:
                found[place].append(score.flatten())
    bars = []
    for pieces in found:
        scores = torch.cat(pieces)
        kept = max(1, round(ratio * len(scores)))
        low = scores.kthvalue(len(scores) - kept + 1).values
        bars.append((float(low), float(scores.max())))
    return bars
