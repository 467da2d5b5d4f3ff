import pytest
import torch

from trap2.errors import UserError
from trap2.protecting.pseudo_tasks import FEWEST, PSEUDO_TASKS, PseudoTask, pseudo_task

WORDS = ["apple", "brick", "cloud", "drum", "eagle", "flute", "grape", "house", "island", "jungle"]
TEXTS = [f"the {WORDS[i % 6]} and {WORDS[6 + i % 4]} {i}" for i in range(60)]


def made(kind: str, seed: int = 0, texts: list[str] = TEXTS) -> PseudoTask:
    directions = torch.nn.functional.normalize(torch.eye(8)[:6] + 0.01, dim=1)
    embeddings = torch.stack([directions[i % 6] for i in range(len(texts))])
    return pseudo_task(kind, texts, embeddings, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["clusters", "words", "shuffled"])
def test_every_kind_is_a_classification_task_drawn_from_its_stream(kind: str) -> None:
    counts = []
    for seed in range(8):
        task = made(kind, seed)
        assert task == made(kind, seed)
        assert len(task.texts) == len(task.labels) > 0
        assert 2 <= len(task.descriptions) <= 6
        assert {*task.labels} <= {*range(len(task.descriptions))}
        assert all(text.strip() for text in (*task.texts, *task.descriptions))
        counts.append(len(task.descriptions))
    assert len({*counts}) > 1
    assert len({str(made(kind, seed)) for seed in range(8)}) > 1


def test_texts_of_one_cluster_share_a_label_under_the_description_of_another() -> None:
    task = made("clusters")
    labels = [{task.labels[i] for i in range(start, 60, 6)} for start in range(6)]
    assert all(len(found) == 1 for found in labels)
    own = dict(zip(task.texts, task.labels, strict=True))
    assert all(own[text] != c for c, text in enumerate(task.descriptions))


def test_the_word_asked_for_is_left_out_and_no_other_stands_in_the_row() -> None:
    task = made("words", seed=3)
    for text, label in zip(task.texts, task.labels, strict=True):
        assert "..." in text
        assert not {*text.split()} & {*task.descriptions}, (text, label)
    assert {*task.descriptions} <= {*WORDS}


def test_too_few_texts_or_words_are_refused_in_one_line() -> None:
    with pytest.raises(UserError) as caught:
        made("shuffled", texts=TEXTS[: FEWEST - 1])
    assert str(caught.value) == ("texts has 23 rows, too few to make tasks of; give 24 or more")
    with pytest.raises(UserError) as caught:
        made("words", texts=["the same"] * 40)
    assert str(caught.value) == (
        "texts has 0 words that stand in 1 to 20 % of its 40 rows, too few to ask for; leave out "
        "the kind words, or give more text"
    )


def test_an_unknown_kind_is_refused() -> None:
    assert list(PSEUDO_TASKS) == ["clusters", "shuffled", "words"]
    with pytest.raises(UserError, match="no pseudo-task is called 'cluster'"):
        made("cluster")
