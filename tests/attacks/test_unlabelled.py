"""Rows in front of a live model: the right weights, gradients, inputs, and nothing left behind."""

import pytest
import torch

from attacks.tiny import BIAS, FIRST, SECOND, World
from trap2.attacks.attack import merge
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
