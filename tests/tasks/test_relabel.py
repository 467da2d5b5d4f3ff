"""Re-labelling reads what is in the outputs, however they are moved, and nothing that is not."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trap2.errors import UserError
from trap2.tasks.evaluation import Classification
from trap2.tasks.relabel import READERS, cross_validated_accuracy, relabelled_accuracy


def skilled(rows: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Logits that answer every row rightly, and the labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % classes
    logits = 0.5 * torch.randn(rows, classes, generator=generator)
    logits[torch.arange(rows), labels] += 6
    return logits, labels


def halves(
    change: Callable[[Tensor], Tensor], classes: int = 6
) -> tuple[Classification, Classification]:
    """Validation and test rows whose logits were changed in the same way."""
    fit, fit_labels = skilled(300, classes, 0)
    score, score_labels = skilled(200, classes, 1)
    return Classification(change(fit), fit_labels), Classification(change(score), score_labels)


@settings(max_examples=8)
@given(order=st.permutations(range(6)))
def test_permuted_answers_are_recovered_by_30_rows(order: list[int]) -> None:
    fit, score = halves(lambda logits: logits[:, order])
    assert relabelled_accuracy(fit, score, 30) == 1.0
    assert cross_validated_accuracy(fit, 30) == 1.0


def test_untouched_answers_stay() -> None:
    fit, score = halves(lambda logits: logits)
    assert score.accuracy == 1.0
    assert relabelled_accuracy(fit, score, 2) == 1.0
    assert relabelled_accuracy(fit, score, 30) == 1.0


def test_answers_moved_by_a_bias_are_recovered() -> None:
    bias = torch.tensor([40.0, -7, 0, 3, 12, -30])
    fit, score = halves(lambda logits: logits + bias)
    assert score.accuracy < 0.2
    assert relabelled_accuracy(fit, score, 60) > 0.97


@pytest.mark.parametrize("kind", ["bias", "linear"])
def test_the_bias_and_the_linear_reader_undo_a_bias(kind: str) -> None:
    fit, score = halves(lambda logits: logits + torch.tensor([9.0, 0, -5]), classes=3)
    read = READERS[kind](fit.logits.double().numpy(), fit.labels.numpy())
    assert (read(score.logits.double().numpy()) == score.labels.numpy()).mean() > 0.97


def test_answers_behind_a_linear_map_are_recovered() -> None:
    mixing = torch.randn(6, 6, generator=torch.Generator().manual_seed(3))
    fit, score = halves(lambda logits: -logits @ mixing)
    assert score.accuracy < 0.5
    assert relabelled_accuracy(fit, score, 300) == 1.0


def test_inverted_answers_of_two_classes_are_recovered() -> None:
    fit, score = halves(lambda logits: -logits, classes=2)
    assert score.accuracy == 0.0
    assert relabelled_accuracy(fit, score, 30) == 1.0


@pytest.mark.parametrize("rows", [30, 300])
@pytest.mark.parametrize("seed", range(3))
def test_noise_stays_at_chance(rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    fit, score = halves(lambda logits: torch.randn(logits.shape, generator=generator))
    assert abs(relabelled_accuracy(fit, score, rows) - 1 / 6) < 0.1
    assert abs(cross_validated_accuracy(fit, 300) - 1 / 6) < 0.1


def test_a_constant_answer_stays_at_chance() -> None:
    fit, score = halves(lambda logits: torch.ones_like(logits))
    assert relabelled_accuracy(fit, score, 300) <= 1 / 6 + 0.01


def test_broken_rows_do_not_break_the_reading() -> None:
    def broken(logits: Tensor) -> Tensor:
        logits = logits.clone()
        logits[::10] = float("nan")
        logits[5::10, 0] = float("inf")
        return logits

    fit, score = halves(broken)
    assert 0.7 < relabelled_accuracy(fit, score, 100) <= 1.0


def test_only_the_rows_asked_for_are_read() -> None:
    fit, score = halves(lambda logits: logits.roll(1, 1))
    lies = fit.labels.clone()
    lies[40:] = lies[40:].roll(1)
    lying = Classification(fit.logits, lies)
    assert relabelled_accuracy(lying, score, 40) == relabelled_accuracy(fit, score, 40) == 1.0


def test_a_class_that_the_few_rows_lack_does_no_harm() -> None:
    fit, score = halves(lambda logits: logits)
    rows = (fit.labels < 2).nonzero().squeeze(1)
    few = Classification(fit.logits[rows], fit.labels[rows])
    assert relabelled_accuracy(few, score, 20) == 1.0
    one = Classification(fit.logits[rows][::2], fit.labels[rows][::2])
    assert 0.0 <= relabelled_accuracy(one, score, 20) <= 1.0


def test_too_few_rows_are_refused() -> None:
    fit, score = halves(lambda logits: logits)
    with pytest.raises(UserError) as caught:
        relabelled_accuracy(fit, score, 301)
    assert str(caught.value) == (
        "re-labelling with 301 rows needs as many validation rows, there are 300; raise "
        "validation_rows or lower relabel_rows"
    )
    for read in (
        lambda: cross_validated_accuracy(Classification(fit.logits[:1], fit.labels[:1]), 1),
        lambda: relabelled_accuracy(fit, score, 1),
    ):
        with pytest.raises(UserError) as caught:
            read()
        assert str(caught.value) == (
            "re-labelling needs 2 rows or more, there are 1; give more rows"
        )


def test_it_draws_nothing_from_a_global_stream() -> None:
    fit, score = halves(lambda logits: logits)
    state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    first = relabelled_accuracy(fit, score, 100)
    assert relabelled_accuracy(fit, score, 100) == first
    assert (np.random.get_state()[1] == state).all()
    assert torch.equal(torch.get_rng_state(), torch_state)
