"""Running statistics counted anew: by hand, only in their layers, for good or for a while."""

from itertools import chain

import pytest
import torch
from torch import nn

from trap2.statistics import BATCH, mixed, normalising, recomputed, recount


class Normed(nn.Module):
    """Dropout, a batch-norm layer with statistics and one without."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(2, momentum=0.3)
        self.batch_alone = nn.BatchNorm1d(2, track_running_stats=False)

    def forward(self, x):
        return self.batch_alone(self.norm(self.dropout(x)))


def state(model):
    return {n: v.clone() for n, v in model.state_dict().items()}


def test_the_statistics_are_the_mean_over_batches_and_go_back_to_the_bit():
    model = Normed().eval()
    model.norm.running_mean.fill_(3.0)
    model.norm.num_batches_tracked.fill_(7)
    before = state(model)
    draw = torch.Generator().manual_seed(0)
    batches = [{"x": 2 * torch.randn(5, 2, generator=draw) + 1} for _ in range(3)]
    with recomputed(model, batches):
        mean = torch.stack([batch["x"].mean(0) for batch in batches]).mean(0)
        variance = torch.stack([batch["x"].var(0) for batch in batches]).mean(0)
        torch.testing.assert_close(model.norm.running_mean, mean)
        torch.testing.assert_close(model.norm.running_var, variance)
        assert not any(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.norm.momentum == 0.3


@pytest.mark.parametrize("training", [True, False])
def test_counted_anew_they_stay_and_nothing_else_is_changed(training):
    model = Normed().train(training)
    model.norm.running_mean.fill_(3.0)
    rows = 2 * torch.randn(5, 2, generator=torch.Generator().manual_seed(0)) + 1
    recount(model, [{"x": rows}])
    torch.testing.assert_close(model.norm.running_mean, rows.mean(0))
    torch.testing.assert_close(model.norm.running_var, rows.var(0))
    assert all(module.training is training for module in model.modules())
    assert model.norm.momentum == 0.3
    counted = state(model)
    recount(model, [])
    assert all(torch.equal(value, counted[name]) for name, value in model.state_dict().items())


def test_they_go_back_after_an_error_and_so_does_the_mode():
    model = Normed().train()
    before = state(model)
    with (
        pytest.raises(ValueError, match="more than 1 value"),
        recomputed(model, [{"x": torch.ones(1, 2)}]),
    ):
        pass
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.norm.training
    assert model.norm.momentum == 0.3
    assert normalising(model) == [model.norm]


def test_every_row_is_in_one_batch_and_every_batch_has_rows_of_every_task():
    tasks = [[(task, row) for row in range(count)] for task, count in enumerate((50, 50, 40))]
    batches = mixed(tasks)
    assert sorted(row for batch in batches for row in batch) == sorted(chain(*tasks))
    assert [len(batch) for batch in batches] == [46, 47, 47]
    assert max(map(len, batches)) <= BATCH
    assert all({task for task, _ in batch} == {0, 1, 2} for batch in batches)
    assert mixed([[1], [2, 3]]) == [[1, 2, 3]]
