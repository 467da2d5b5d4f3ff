"""Rows in front of a live model: the right weights, gradients, inputs, and nothing left behind."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from attacks.tiny import BIAS, FIRST, SECOND, World
from trap2.attacks.attack import merge
from trap2.attacks.live import LiveModel
from trap2.attacks.unlabelled import Unlabelled
from trap2.errors import UserError


@pytest.fixture(scope="module")
def world():
    return World()


def test_logits_are_those_of_base_plus_update_and_the_base_stays(world):
    before = {n: v.clone() for n, v in world.encoder.state_dict().items()}
    data, update = world.data[0], world.updates[0]
    found = torch.cat([data.logits(update, batch) for batch in data.batches()])
    torch.testing.assert_close(found, world.logits(0, update))
    part = {FIRST: update[FIRST]}
    torch.testing.assert_close(data.logits(part, data.batch(range(20))), world.logits(0, part))
    assert all(torch.equal(v, before[n]) for n, v in world.encoder.state_dict().items())


def test_gradients_flow_to_the_update_alone(world):
    delta = torch.zeros_like(world.weight(FIRST)).requires_grad_()
    loss = world.data[0].logits({FIRST: delta}, world.data[0].batch([0, 1])).square().sum()
    (found,) = torch.autograd.grad(loss, [delta])
    step = torch.zeros_like(delta)
    step[0, 1] = 1e-3
    with torch.no_grad():
        up, down = (
            float(world.data[0].logits({FIRST: s}, world.data[0].batch([0, 1])).square().sum())
            for s in (step, -step)
        )
    assert float(found[0, 1]) == pytest.approx((up - down) / 2e-3, rel=1e-2)


def test_rows_come_in_order_and_in_batches(world):
    sizes = [len(batch["x"]) for batch in world.data[0].batches(size=8)]
    assert sizes == [8, 8, 4]
    whole = torch.cat([batch["x"] for batch in world.data[0].batches(size=8)])
    assert torch.equal(whole, world.x[0])
    assert world.data[0].serial != world.data[1].serial


def test_what_goes_into_linear_layers_is_seen_without_padding(world):
    seen = {}
    update = world.updates[0]
    names = world.data[0].linear(update)
    assert list(names) == [FIRST, SECOND]  # a bias is no linear layer
    world.data[0].see(update, names, lambda n, x: seen.setdefault(n, []).append(x))
    torch.testing.assert_close(torch.cat(seen[FIRST]), world.tokens(0))
    torch.testing.assert_close(torch.cat(seen[SECOND]), world.after_first(0, update))


def test_a_run_ends_once_all_is_seen_and_leaves_no_hook(world):
    ran = []
    hook = world.encoder.blocks[1].register_forward_pre_hook(lambda *_: ran.append(1))
    world.data[0].see({}, [FIRST], lambda n, x: None, once=True)
    assert ran == []
    world.data[0].see({}, [FIRST], lambda n, x: None)
    assert len(ran) == 2  # two batches
    hook.remove()
    assert not world.encoder.blocks[0].linear._forward_pre_hooks


def test_a_model_without_rows_is_refused(world):
    with pytest.raises(UserError, match="'regmean' got unlabelled rows of 0 models for 2; give da"):
        merge("regmean", world.updates, 1.0, alpha=1.0)


def test_without_a_mask_every_token_counts(world):
    from trap2.attacks.unlabelled import _tokens

    assert _tokens(torch.zeros(2, 3, 4), None).shape == (6, 4)
    assert _tokens(torch.zeros(2, 4), torch.ones(2, 3)).shape == (2, 4)
    assert BIAS in world.updates[0]


def test_running_statistics_take_no_gradient_and_no_variance_is_below_zero():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, x):
            return SimpleNamespace(logits=self.norm(x))

    model = Normed().eval()
    data = Unlabelled(LiveModel(model), model, 3, lambda places: {"x": torch.ones(len(places), 2)})
    at = {
        "norm.weight": torch.zeros(2, requires_grad=True),
        "norm.running_mean": torch.full((2,), 0.5, requires_grad=True),
        "norm.running_var": torch.tensor([-3.0, 1.0], requires_grad=True),
    }
    found = data.weights(at)
    assert found["norm.running_var"].tolist() == [0.0, 2.0]
    assert found["norm.running_mean"].tolist() == [0.5, 0.5]
    logits = data.logits(at, data.batch(range(3)))
    assert torch.isfinite(logits).all()
    gradients = torch.autograd.grad(logits.sum(), list(at.values()), allow_unused=True)
    assert [gradient is None for gradient in gradients] == [False, True, True]
