"""PCB against its formula written out in numpy over the whole update, and by hand."""

import numpy as np
import pytest
import torch

from trap2.attacks import pcb as module
from trap2.attacks.attack import merge
from trap2.attacks.vectors import TaskVector
from trap2.errors import UserError


def pcb(updates, coefficients, ratio=0.5):
    return dict(merge("pcb", updates, coefficients, ratio=ratio))


def formula(rows, weights, ratio, clipped=0):
    """dW for rows of whole updates, equal in their places."""
    unit = max(weights, key=abs)
    shares = [w / unit for w in weights if w]
    scaled = [s * row for s, row in zip(shares, rows, strict=True)]
    total = sum(scaled)
    above = below = np.zeros(len(total))
    for row in scaled:
        sizes = np.sort(abs(row))
        a = abs(row).clip(sizes[clipped], sizes[len(sizes) - 1 - clipped])
        x = (a - a.min()) / (a.max() - a.min())
        b = np.exp(len(rows) * x**2) * np.tanh(row * total)
        kept = np.sort(b)[-max(1, round(ratio * len(b))) :]
        g = ((b - kept[0]) / (kept[-1] - kept[0])).clip(0)
        above, below = above + g * np.sign(row) * a, below + g
    return unit * np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def test_by_hand():
    # x = (0 1) and (1 0), N = 2, sum (4 4): b = (tanh 4, e^2 tanh 12) and (e^2 tanh 12, tanh 4).
    # The upper half of each is its one larger entry; with both kept g = (0 1) and (1 0).
    one, two = {"w": torch.tensor([[1.0, 3.0]])}, {"w": torch.tensor([[3.0, 1.0]])}
    assert torch.equal(pcb([one, two], 0.5, ratio=1.0)["w"], torch.tensor([[1.5, 1.5]]))


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 0.5, 0.5], [0.7, -0.4, 1.0]])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0])
def test_equals_the_formula_in_numpy(weights, ratio):
    rows = torch.randn(3, 60, generator=torch.Generator().manual_seed(0))
    updates = [{"a": row[:24].view(6, 4), "b": row[24:]} for row in rows]
    merged = pcb(updates, weights, ratio)
    ours = torch.cat([merged["a"].flatten(), merged["b"]])
    expected = formula(rows.double().numpy(), weights, ratio)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5)


def test_the_largest_and_the_smallest_entries_are_clipped(monkeypatch):
    monkeypatch.setattr(module, "CLIPPED", 0.05)
    rows = torch.randn(2, 60, generator=torch.Generator().manual_seed(1))
    ours = pcb([{"a": row} for row in rows], 1.0)["a"]
    expected = formula(rows.double().numpy(), [1.0, 1.0], 0.5, clipped=3)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5)


def test_coefficient_0_drops_a_model_and_equal_ones_are_a_common_factor():
    rows = torch.randn(3, 30, generator=torch.Generator().manual_seed(2))
    updates = [TaskVector.of({"w": row}) for row in rows]
    two = pcb(updates[:2], 1.0)["w"]
    assert torch.equal(pcb(updates, [0.5, 0.5, 0.0])["w"], 0.5 * two)
    assert torch.equal(pcb(updates, 0.0)["w"], torch.zeros(30))
    assert torch.equal(pcb([*updates[:2], TaskVector.of({})], 1.0)["w"], two)


def test_a_tensor_only_one_model_has_competes_within_that_model():
    one, two = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 4.0, 2.0, 3.0])
    merged = pcb([{"a": one}, {"b": two}], 1.0)
    for own, row in ((merged["a"], one), (merged["b"], two)):
        expected = formula([row.double().numpy()], [1.0], 0.5)
        np.testing.assert_allclose(own, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("ratio", [0.0, 1.5])
def test_ratio_out_of_range(ratio):
    with pytest.raises(UserError, match=f"ratio={ratio} lets no entry compete; use 0 < ratio <= 1"):
        pcb([{"w": torch.ones(2)}], 1.0, ratio)
