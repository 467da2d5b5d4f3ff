"""Task arithmetic by hand, against mergekit, and against peft's `cat`."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trap2.attacks.attack import merge

QUICK = settings(deadline=None, max_examples=30)


def test_by_hand():
    #     [1  2]         [ 4 0]   [0.5 - 8   1    ]   [-7.5  1]
    # 0.5*[3 -4]  +  -2 *[-1 1] = [1.5 + 2  -2 - 2] = [ 3.5 -4]
    one = {"w": torch.tensor([[1.0, 2.0], [3.0, -4.0]])}
    two = {"w": torch.tensor([[4.0, 0.0], [-1.0, 1.0]])}
    ((name, merged),) = merge("task_arithmetic", [one, two], [0.5, -2.0])
    assert name == "w"
    assert torch.equal(merged, torch.tensor([[-7.5, 1.0], [3.5, -4.0]]))


def test_the_updates_stay_as_they_are():
    one = {"w": torch.ones(2)}
    ((_, merged),) = merge("task_arithmetic", [one], 1.0)
    merged.zero_()
    assert torch.equal(one["w"], torch.ones(2))


@QUICK
@given(st.lists(st.lists(st.integers(-8, 8), min_size=3, max_size=3), min_size=1, max_size=4))
def test_permutation_and_scale(rows):
    updates = [{"w": torch.tensor(row) / 4} for row in rows]
    ((_, once),) = merge("task_arithmetic", updates, 0.5)
    ((_, again),) = merge("task_arithmetic", updates[::-1], 0.5)
    ((_, tripled),) = merge("task_arithmetic", updates, 1.5)
    assert torch.equal(once, again)
    assert torch.equal(3 * once, tripled)


def test_equals_mergekit():
    mergekit = pytest.importorskip("mergekit.merge_methods.api")
    generator = torch.Generator().manual_seed(0)
    base, one, two = torch.randn(3, 5, 4, generator=generator)
    theirs = mergekit.merge_tensors(
        [base, base + one, base + two],
        "task_arithmetic",
        base_index=0,
        parameters={"weight": {1: 0.3, 2: -0.7}},
    )
    ((_, ours),) = merge("task_arithmetic", [{"w": one}, {"w": two}], [0.3, -0.7])
    torch.testing.assert_close(base + ours, theirs, rtol=0, atol=1e-6)


def test_equals_peft_cat_at_different_ranks():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5))
    first = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0"], init_lora_weights=False)
    second = peft.LoraConfig(r=3, lora_alpha=1, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(model, first, adapter_name="one")
    model.add_adapter("two", second)
    model.add_weighted_adapter(["one", "two"], [0.4, -1.5], "both", combination_type="cat")
    layer = model.base_model.model[0]
    updates = [{"w": layer.get_delta_weight(adapter).detach()} for adapter in ("one", "two")]
    ((_, ours),) = merge("task_arithmetic", updates, [0.4, -1.5])
    torch.testing.assert_close(ours, layer.get_delta_weight("both").detach(), rtol=0, atol=1e-6)
