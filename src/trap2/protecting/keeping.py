"""How the trap's gradients get into `.grad`: capped (`cap.py`), or left out (`guard.py`).

Where little of a model is trained, as with an adapter, the gradients of a pass are kept apart until
it has ended, and all tensors are judged and added together: on a GPU hundreds of small ones, each
judged by a dozen kernels on its way, cost more than the pass itself. Otherwise each is judged when
it has arrived, added, and let go before the next one comes: of a whole model a second set would be
as large as the model. Where processes share gradients or tensors, what reduces them must find them
in `.grad`, so they are judged on their way there.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from trap2.protecting.cap import Cap, product, squared_norm
from trap2.protecting.config import Trap2Config
from trap2.protecting.easing import Easing
from trap2.protecting.guard import Guard
from trap2.protecting.sparing import sparing
from trap2.protecting.tuners import Adapter
from trap2.protecting.wrappers import is_sharded, processes

LITTLE = 0.1
"""Share of a model up to which a second set of its gradients does not matter."""


class Keeper:
    """Lets the trap's gradients into `.grad`.

    Args:
        model: The model in training.
        cap: Holds them to a multiple of the nominal ones.
        guard: Leaves out what is not finite.
        easing: How much of them the task bears; by default all.
        spare: Share of the trained tensors, in the model's own order, from the input on, that get
            none of them.
        joint: Whether the trap rides in the nominal pass (`joint.py`): then its gradients come
            apart, however much is trained.
    """

    def __init__(
        self,
        model: nn.Module,
        cap: Cap,
        guard: Guard,
        easing: Easing | None = None,
        spare: float = 0.0,
        joint: bool = False,
    ) -> None:
        everything = [*model.parameters()]
        self._trained = [p for p in everything if p.requires_grad]
        little = _size(self._trained) <= LITTLE * _size(everything)
        self._sharded = any(map(is_sharded, self._trained))
        self._little = little and not self._sharded
        self._joint = joint
        self._own: dict[int, Tensor] = {}
        self.cap, self.guard, self.easing = cap, guard, easing or Easing(0.0)
        self._spared = self._trained[: int(spare * len(self._trained))]

    @classmethod
    def of(cls, model: nn.Module, config: Trap2Config, has_scaler: bool) -> "Keeper":
        """As the settings ask for; `has_scaler` is the guard's."""
        cap, guard = Cap(model, config.cap), Guard(model, has_scaler=has_scaler)
        spare = 0.0 if Adapter(model) else config.spare
        return cls(model, cap, guard, Easing(config.ease), spare, config.one_pass)

    @property
    def _apart(self) -> bool:
        # What reduces gradients over processes has to find all of them in `.grad`.
        return self._joint or (self._little and processes() == 1)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Around the nominal pass: take note of its gradients' norms."""
        self.cap.eased = self.easing.factor
        if not self._apart:
            with self.cap.listening():
                yield
            return
        self.cap.forget()
        before = self._taken()
        try:
            yield
        finally:
            own = _dense(self._taken())
            if self.cap.multiple:
                self._own = dict(zip(own, _squares([*own.values()]), strict=True))
            self._put(before)
            self._add(own)

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Around a trap pass, inside everything else that changes its gradients."""
        with self._letting_in(), sparing(self._spared):
            yield

    @contextmanager
    def _letting_in(self) -> Iterator[None]:
        if not self._apart:
            with self._passing() if self._sharded or processes() > 1 else self._arriving():
                yield
            return
        before = self._taken()
        try:
            yield
            found = self._taken()
        finally:
            self._put(before)
        self.judge([*zip(self._trained, found, strict=True)])

    @contextmanager
    def _passing(self) -> Iterator[None]:
        """Gradients are judged on their way to `.grad`."""
        with self.cap.holding(), self.guard.watch():
            yield

    @contextmanager
    def _arriving(self) -> Iterator[None]:
        """Gradients are judged one by one as they come to lie in `.grad`, which is empty for it."""
        before = self._taken()
        with ExitStack() as stack:
            stack.callback(self._put, before)
            for place, parameter in enumerate(self._trained):
                act = partial(self._arrived, before, place)
                hook = parameter.register_post_accumulate_grad_hook(act)  # type: ignore[no-untyped-call]
                stack.callback(hook.remove)
            yield
        self.guard.settle()

    @torch.no_grad()
    def _arrived(self, before: list[Tensor | None], place: int, parameter: Tensor) -> None:
        """Add the gradient that has come to the one that was there before."""
        grad, parameter.grad = parameter.grad, None
        assert grad is not None
        grad, gathered = grad.coalesce() if grad.is_sparse else grad, before[place]
        size = squared_norm(grad)
        share = self.cap.judge(self._trained[place], grad, size, gathered)
        fit = self.guard.fit(size.reshape(1))
        if grad.device.type != "cpu":
            grad.masked_fill_(~fit, 0.0)  # to look would be to wait
        elif not fit:
            return
        if share is None:
            return
        if gathered is None:
            before[place] = grad.mul_(share.to(grad.dtype))
        elif grad.is_sparse:
            gathered.add_(grad.mul_(share.to(grad.dtype)))
        else:
            gathered.addcmul_(grad, share.to(grad.dtype))

    def judge(self, gradients: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        """Add gradients of the trap to the nominal ones, as far as cap and guard let them."""
        given = {id(parameter): gradient for parameter, gradient in gradients}
        found = _dense([given.get(id(parameter)) for parameter in self._trained])
        if self.cap.multiple:  # what the task does not move, the trap must not either
            found = {place: grad for place, grad in found.items() if place in self._own}
        if found:
            squares = _squares([*found.values()])
            shares = torch.ones_like(squares)
            if self.cap.multiple:
                own = torch.stack([self._own[place] for place in found])
                shares = self.cap.share(own, squares)
                gathered = [self._trained[place].grad for place in found]
                inner = map(product, gathered, found.values())
                self.cap.note(shares, torch.stack([p.to(shares) for p in inner]))
            fit = self.guard.fit(squares)
            factors = torch.where(fit, shares, -1.0).tolist()  # the one wait for a GPU
            let_in = {p: f for p, f in zip(found, factors, strict=True) if f >= 0}
            found = {place: found[place] for place in let_in}
            if found:
                torch._foreach_mul_([*found.values()], [*let_in.values()])
            self._add(found)
        self.guard.settle()

    def _taken(self) -> list[Tensor | None]:
        """What is in `.grad`, which is empty afterwards."""
        found = [parameter.grad for parameter in self._trained]
        self._put([None] * len(found))
        return found

    def _put(self, gradients: Sequence[Tensor | None]) -> None:
        for parameter, gradient in zip(self._trained, gradients, strict=True):
            parameter.grad = gradient

    def _add(self, gradients: dict[int, Tensor]) -> None:
        """Add to what is in `.grad`."""
        there, more = [], []
        for place, gradient in gradients.items():
            parameter = self._trained[place]
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                there.append(parameter.grad)
                more.append(gradient)
        if there:
            torch._foreach_add_(there, more)


def _size(parameters: Sequence[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _dense(gradients: Sequence[Tensor | None]) -> dict[int, Tensor]:
    """Those that are there, by their places."""
    there = {place: grad for place, grad in enumerate(gradients) if grad is not None}
    return {place: g.to_dense() if g.is_sparse else g for place, g in there.items()}


@torch.no_grad()
def _squares(gradients: Sequence[Tensor]) -> Tensor:
    """Squared norms (n,), in float32 at least: a half would overflow."""
    if not gradients:
        return torch.zeros(0)
    wide = torch.promote_types(gradients[0].dtype, torch.float32)
    norms = torch._foreach_norm([*gradients], 2, dtype=wide)
    return torch.stack([norm.to(norms[0].device) for norm in norms]).square()
