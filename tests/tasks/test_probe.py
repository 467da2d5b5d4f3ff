"""The linear probe: what it reads from, and that it reads what is there."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from trap2.errors import UserError
from trap2.tasks.evaluation import Classification
from trap2.tasks.probe import Representation, probed_accuracy


class Says(nn.Module):
    """An encoder that gives what it is given."""

    def forward(self, x, **inputs):
        return SimpleNamespace(last_hidden_state=x)


def test_a_representation_is_the_mean_over_tokens_that_are_no_padding():
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [100.0, 100.0]]])
    whole = Representation(Says())
    assert whole(x=x, attention_mask=torch.tensor([[1, 1, 0]])).logits.tolist() == [[2.0, 3.0]]
    assert whole(x=x[:, :2]).logits.tolist() == [[2.0, 3.0]]
    image = torch.arange(8.0).reshape(1, 2, 2, 2)
    assert whole(x=image).logits.tolist() == [[1.5, 5.5]]


def rows(count, seed, classes=3):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=draw)
    noise = torch.randn(count, 12, generator=draw)
    noise[:, 5] += 8.0 * labels
    return Classification(noise, labels)


def test_it_reads_a_linear_trace_and_nothing_from_noise():
    fit, score = rows(60, 0, classes=2), rows(300, 1, classes=2)
    assert probed_accuracy(fit, score, 60) > 0.95
    noise = torch.randn(360, 12, generator=torch.Generator().manual_seed(2))
    blind = Classification(noise[:60], fit.labels), Classification(noise[60:], score.labels)
    assert probed_accuracy(*blind, 60) < 0.65


def test_it_uses_no_more_rows_than_it_may():
    fit, score = rows(60, 0), rows(100, 1)
    spoilt = Classification(fit.logits.clone(), fit.labels.clone())
    spoilt.labels[20:] = 0
    assert probed_accuracy(fit, score, 20) == probed_accuracy(spoilt, score, 20)


def test_rows_of_one_class_say_that_class():
    fit = Classification(torch.randn(5, 3), torch.ones(5, dtype=torch.long))
    score = Classification(torch.randn(4, 3), torch.tensor([1, 1, 1, 0]))
    assert probed_accuracy(fit, score, 5) == 0.75
    with pytest.raises(UserError, match="needs 2 rows or more, there are 1"):
        probed_accuracy(fit, score, 1)
