"""Prompts and completions: each score against the slowest computation there is, row by row."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trap2.errors import UserError
from trap2.tasks.data import Rows
from trap2.tasks.evaluate import Evaluator
from trap2.tasks.evaluation import Classification, Prediction, Scored
from trap2.tasks.language import IGNORED, joined, normalised, tokens
from trap2.tasks.model import Inputs, load_encoder
from trap2.taskspec import TaskSpec

END = 1
PROMPTS = ["w2 w3", "w4", "", "w5 w6 w7 w8", ""]
COMPLETIONS = ["w4 w5", "w9 w10 w11", "w2 w3 w4 w5 w6 w7", "w3", "w8 w8"]
OPTIONS = ("w9", "w10 w11", "w12 w13 w14")


def spec(kind: str, **changes: Any) -> TaskSpec:
    return TaskSpec.model_validate(
        {"name": "t", "kind": kind, "data": {"train": "unused.csv"}, **changes}
    )


@pytest.fixture(scope="module")
def model(pico_llama: Path) -> nn.Module:
    return load_encoder(pico_llama, language=True)


def evaluator(model: nn.Module, base: Path, task: TaskSpec, rows: Rows, size: int = 2) -> Evaluator:
    return Evaluator(model, Inputs(base, task), rows, size)


def ids(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


@torch.no_grad()
def log_probabilities(model: nn.Module, row: list[int]) -> Tensor:
    """Of the token after each position, one row alone and without padding."""
    logits: Tensor = model(input_ids=torch.tensor([row])).logits
    return logits[0].log_softmax(-1)


def by_hand(model: nn.Module, prompt: str, completion: str) -> tuple[int, float, int]:
    before, after = ids(prompt), ids(completion) + ([END] if prompt else [])
    said = log_probabilities(model, before + after)
    first = max(1, len(before))  # nothing comes before the first token
    places = range(first, len(before + after))
    row = before + after
    right = sum(int(said[i - 1].argmax()) == row[i] for i in places)
    return right, -sum(float(said[i - 1, row[i]]) for i in places), len(places)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_completions_are_read_token_by_token(model: nn.Module, pico_llama: Path, size: int) -> None:
    rows = Rows(PROMPTS, COMPLETIONS)
    found = evaluator(model, pico_llama, spec("language"), rows, size)()
    wanted = [by_hand(model, p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert isinstance(found, Prediction)
    assert torch.allclose(found.outputs, torch.tensor(wanted), atol=1e-4)
    assert found.loss == pytest.approx(sum(w[1] for w in wanted) / sum(w[2] for w in wanted))
    assert found.accuracy == pytest.approx(sum(w[0] / w[2] for w in wanted) / len(wanted))
    likely = evaluator(model, pico_llama, spec("language", score="likelihood"), rows, size)()
    geometric = [float(torch.tensor(-nats / count).exp()) for _, nats, count in wanted]
    assert likely.scores.tolist() == pytest.approx(geometric, abs=1e-5)
    assert torch.equal(likely.compared, likely.outputs[:, 1])


def test_the_loss_is_the_models_own(model: nn.Module, pico_llama: Path) -> None:
    found = evaluator(model, pico_llama, spec("language"), Rows([""], [COMPLETIONS[2]]))()
    row = torch.tensor([ids(COMPLETIONS[2])])
    assert found.loss == pytest.approx(float(model(input_ids=row, labels=row).loss), abs=1e-5)


def test_who_says_the_commonest_token_is_right_by_chance(
    model: nn.Module, pico_llama: Path
) -> None:
    rows = Rows(["", ""], ["w2 w3 w3", "w4 w3 w5 w6"])
    reading = evaluator(model, pico_llama, spec("language"), rows).reading
    assert reading.chance == pytest.approx(3 / 5)  # the first token of a text is no target
    assert reading.classes == 0


def test_a_row_without_a_number_scores_nothing() -> None:
    outputs = torch.tensor([[2.0, 1.0, 4.0], [3.0, float("nan"), 3.0], [0.0, float("inf"), 2.0]])
    assert Prediction(outputs).scores.tolist() == [0.5, 0.0, 0.0]
    assert Scored(torch.tensor([[1.0], [float("nan")]])).accuracy == 0.5
    assert Scored(torch.tensor([[1.0], [0.25]])).loss == pytest.approx(0.375)
    later = Prediction(outputs, likelihood=True).after(1)
    assert len(later) == 2
    assert later.likelihood


@pytest.mark.parametrize(
    ("prompt", "completion", "whole"),
    [
        ("a", "b", "a b"),
        ("a ", "b", "a b"),
        ("a:\n", "b", "a:\nb"),
        ("a", " b", "a b"),
        ("", "b", "b"),
        ("a", "", "a"),
    ],
)
def test_a_space_is_put_in_where_there_is_none(prompt: str, completion: str, whole: str) -> None:
    assert joined(prompt, completion) == whole


def test_targets_are_the_completion_and_its_end(pico_llama: Path) -> None:
    inputs = Inputs(pico_llama, spec("language", max_length=4))
    given, plain = tokens(inputs, ["w2 w3 w4", ""], ["w5", "w6 w7 w8 w9 w10"])
    assert given.ids == [3, 4, 5, END]  # too long: a prompt loses its beginning
    assert given.labels == [IGNORED, IGNORED, 5, END]
    assert plain.ids == plain.labels == [6, 7, 8, 9]  # and plain text its end
    assert plain.targets == [7, 8, 9]
    (bare,) = tokens(inputs, ["w2"], ["w5"], end=False)
    assert bare.labels == [IGNORED, 5]


def test_a_row_with_nothing_to_predict_is_refused(pico_llama: Path) -> None:
    inputs = Inputs(pico_llama, spec("language"))
    with pytest.raises(UserError) as caught:
        tokens(inputs, ["", ""], ["w2 w3", "w4"])
    assert str(caught.value) == (
        "row 1 of task 't' has no token to predict ('w4'); remove it or raise task.max_length"
    )


@pytest.mark.parametrize("normal", [True, False])
def test_a_choice_is_made_by_likelihood(model: nn.Module, pico_llama: Path, normal: bool) -> None:
    prompts = ["w2 w3", "w4 w5 w6", "w7"]
    rows = Rows([(p, OPTIONS) for p in prompts], [0, 2, 2])
    task = spec("choice", length_normalised=normal)
    found = evaluator(model, pico_llama, task, rows)()
    assert isinstance(found, Classification)
    for prompt, logits in zip(prompts, found.logits, strict=True):
        for option, value in zip(OPTIONS, logits, strict=True):
            before, after = ids(prompt), ids(option)
            said = log_probabilities(model, before + after)
            places = range(len(before), len(before + after))
            total = sum(float(said[i - 1, (before + after)[i]]) for i in places)
            wanted = total / len(option) if normal else total
            assert float(value) == pytest.approx(wanted, abs=1e-4)
    assert found.labels.tolist() == [0, 2, 2]
    reading = evaluator(model, pico_llama, task, rows).reading
    assert (reading.classes, reading.chance) == (3, pytest.approx(2 / 3))


def test_options_are_as_many_in_every_row(model: nn.Module, pico_llama: Path) -> None:
    rows = Rows([("w2", OPTIONS), ("w3", OPTIONS[:2])], [0, 1])
    with pytest.raises(UserError) as caught:
        evaluator(model, pico_llama, spec("choice"), rows)
    assert str(caught.value) == (
        "rows of task 't' have 2 or 3 options; all need as many, so that outputs have one "
        "meaning: part the rows"
    )


def generated(model: Any, prompt: str, count: int = 5) -> list[int]:
    """Greedy, one token after the other."""
    row = ids(prompt)
    for _ in range(count):
        following = int(log_probabilities(model, row)[-1].argmax())
        if following == END:
            break
        row.append(following)
    return row[len(ids(prompt)) :]


def test_what_is_generated_is_compared_with_the_answer(model: nn.Module, pico_llama: Path) -> None:
    prompts = ["w2 w3", "w4 w5 w6 w7 w8", "w9", "w10 w11"]
    answers = [" ".join(f"w{i}" for i in generated(model, p)) for p in prompts]
    rows = Rows(prompts, [answers[0], f" {answers[1].upper()}. ", answers[2] + " w2", answers[3]])
    task = spec("generation", max_new_tokens=5)
    found = evaluator(model, pico_llama, task, rows, 4)()
    assert found.outputs.tolist() == [[1.0], [1.0], [0.0], [1.0]]
    assert found.accuracy == 0.75
    assert found.loss == pytest.approx(0.25)


def test_what_follows_a_stop_does_not_count(model: nn.Module, pico_llama: Path) -> None:
    said = generated(model, "w2 w3")
    task = spec("generation", max_new_tokens=5, stop=f" w{said[1]}")
    found = evaluator(model, pico_llama, task, Rows(["w2 w3"], [f"w{said[0]}"]))()
    assert found.accuracy == 1.0


@pytest.mark.parametrize(
    ("text", "same"),
    [
        (" The  Answer. ", "the answer"),
        ("\uff14\uff12", "42"),
        ('"Yes!"', "yes"),
        ("-5", "-5"),
        ("$5", "$5"),
        ("3.5", "3.5"),
    ],
)
def test_answers_are_compared_without_case_marks_and_spaces(text: str, same: str) -> None:
    assert normalised(text) == same


def test_only_heads_of_classes_give_batches_to_attackers(
    model: nn.Module, pico_llama: Path
) -> None:
    found = evaluator(model, pico_llama, spec("language"), Rows([""], ["w2 w3"]))
    with pytest.raises(UserError, match="task 't' is of kind language and has no head of classes"):
        found.batch([0])
