"""RegMean and its kin against explicit least-squares solves, layer by layer."""

import pytest
import torch

from attacks.tiny import BIAS, FIRST, SECOND, World
from trap2.attacks.attack import merge
from trap2.attacks.gram import Moments, shrunk


@pytest.fixture(scope="module")
def world():
    return World()


def merged(world, name, coefficients=1.0, models=(0, 1), **params):
    updates, data = ([whole[i] for i in models] for whole in (world.updates, world.data))
    return dict(merge(name, updates, coefficients, data=data, **params))


def least_squares(inputs, targets):
    """The W (out, in) with the least sum of |X W' - Y|^2, every model's tokens alike in number."""
    return torch.linalg.lstsq(torch.cat(inputs).double(), torch.cat(targets).double()).solution.T


def weight(world, name, i, c=1.0):
    return world.weight(name, c * world.updates[i][name])


def test_regmean_is_the_least_squares_solution_on_the_models_own_inputs(world):
    found = merged(world, "regmean", alpha=1.0)
    inputs = {
        FIRST: [world.tokens(i) for i in (0, 1)],
        SECOND: [world.after_first(i, world.updates[i]) for i in (0, 1)],
    }
    for name, X in inputs.items():
        targets = [x @ weight(world, name, i).T for i, x in enumerate(X)]
        expected = least_squares(X, targets) - world.weight(name)
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[BIAS], (world.updates[0][BIAS] + world.updates[1][BIAS]) / 2)


def test_regmean_with_nothing_off_the_diagonal_weights_columns(world):
    found = merged(world, "regmean", alpha=0.0)[FIRST]
    squares = [world.tokens(i).square().mean(0) for i in (0, 1)]
    both = sum(s * u[FIRST] for s, u in zip(squares, world.updates, strict=True))
    torch.testing.assert_close(found, both / sum(squares), rtol=1e-4, atol=1e-5)


def test_moments_add_up_to_those_of_all_tokens():
    X, Y = torch.randn(2, 9, 3, generator=torch.Generator().manual_seed(0))
    moments = Moments()
    for part in (slice(0, 2), slice(2, 2), slice(2, 9)):
        moments.add(Y[part], X[part])
    torch.testing.assert_close(moments.value.float(), Y.T @ X / 9)
    G = torch.tensor([[2.0, 1.0], [1.0, 4.0]])
    assert torch.equal(shrunk(G, 0.5), torch.tensor([[2.0, 0.5], [0.5, 4.0]]))


def test_regmean_pp_takes_the_inputs_of_the_merged_model(world):
    found = merged(world, "regmean_pp", alpha=1.0)
    X = [world.after_first(i, found) for i in (0, 1)]
    targets = [x @ weight(world, SECOND, i).T for i, x in enumerate(X)]
    expected = least_squares(X, targets) - world.weight(SECOND)
    torch.testing.assert_close(found[SECOND].double(), expected, rtol=1e-3, atol=1e-4)
    plain = merged(world, "regmean", alpha=1.0)
    torch.testing.assert_close(found[FIRST], plain[FIRST])
    assert not torch.allclose(found[SECOND], plain[SECOND], atol=1e-3)


def test_chain_of_merges_answers_as_the_models_do_on_their_own_inputs(world):
    found = merged(world, "chain_of_merges")
    H = [world.after_first(i, found) for i in (0, 1)]
    X = [world.after_first(i, world.updates[i]) for i in (0, 1)]
    targets = [x @ weight(world, SECOND, i).T for i, x in enumerate(X)]
    expected = least_squares(H, targets) - world.weight(SECOND)
    torch.testing.assert_close(found[SECOND].double(), expected, rtol=1e-3, atol=1e-4)


ALL = [("regmean", {"alpha": 0.9}), ("regmean_pp", {"alpha": 0.9}), ("chain_of_merges", {})]


@pytest.mark.parametrize(("name", "params"), ALL)
def test_one_model_is_that_model_and_a_model_at_0_is_left_out(world, name, params):
    alone = merged(world, name, models=(0,), **params)
    for tensor, delta in world.updates[0].items():
        torch.testing.assert_close(alone[tensor], delta, rtol=1e-4, atol=1e-5)
    dropped = merged(world, name, [1.0, 0.0], **params)
    assert all(torch.equal(dropped[n], alone[n]) for n in alone)
    nothing = merged(world, name, 0.0, **params)
    assert not any(delta.any() for delta in nothing.values())


def test_regmean_is_linear_in_a_common_coefficient(world):
    one, two = (merged(world, "regmean", c, alpha=0.9) for c in (1.0, 0.3))
    for name in one:
        torch.testing.assert_close(two[name], 0.3 * one[name], rtol=1e-4, atol=1e-6)


def test_inputs_that_never_point_somewhere_leave_the_mean_there():
    world = World()
    for x in world.x:
        x[..., 2] = 0.0
    found = merged(world, "regmean", alpha=1.0)[FIRST]
    mean = (world.updates[0][FIRST] + world.updates[1][FIRST]) / 2
    torch.testing.assert_close(found[:, 2], mean[:, 2], rtol=1e-4, atol=1e-5)
