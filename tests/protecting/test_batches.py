import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trap2.errors import UserError
from trap2.protecting.batches import batch_rows, cropped, part_of


def spread(rows: int, used: int) -> list[int]:
    """The middle row of each of `used` equal stretches of the batch."""
    return [int((k + 0.5) * rows / used) for k in range(used)]


def test_rows_come_from_the_whole_batch() -> None:
    """A batch sorted by length must not give its longest rows alone."""
    batch = {"x": torch.arange(32)}
    assert part_of(batch, 0.2, 0, 1)["x"].tolist() == [2, 8, 13, 18, 24, 29]
    assert part_of(batch, 0.2, 0, 2)["x"].tolist() == [2, 13, 24]
    assert part_of(batch, 0.2, 1, 2)["x"].tolist() == [8, 18, 29]


def test_a_small_share_has_the_fewest_rows_and_a_small_batch_all_of_its_own() -> None:
    batch = {"x": torch.arange(16)}
    assert part_of(batch, 0.2, 0, 1)["x"].tolist() == [2, 8, 13]
    assert part_of(batch, 0.2, 0, 1, fewest=4)["x"].tolist() == [2, 6, 10, 14]
    assert part_of(batch, 0.5, 0, 1, fewest=4)["x"].tolist() == list(range(1, 16, 2))
    assert part_of(batch, 0.2, 0, 1, fewest=40)["x"].tolist() == list(range(16))
    assert part_of(batch, 0.2, 0, 2, fewest=4)["x"].tolist() == [2, 10]


@given(st.integers(1, 33), st.floats(0.01, 1.0), st.integers(1, 7))
def test_parts_cover_the_used_rows_and_none_is_empty(rows: int, fraction: float, n: int) -> None:
    batch = {"x": torch.arange(rows), "labels": torch.arange(rows) * 10}
    parts = [part_of(batch, fraction, part, n) for part in range(n)]
    seen = [part["x"].tolist() for part in parts]
    used = max(1, round(fraction * rows))
    assert all(seen)
    assert {row for rows_ in seen for row in rows_} == set(spread(rows, used))
    for part in parts:
        assert torch.equal(part["labels"], part["x"] * 10)
    if used >= n:  # disjoint and as equal as whole rows allow
        sizes = [len(rows_) for rows_ in seen]
        assert sum(sizes) == used
        assert max(sizes) - min(sizes) <= 1


def test_a_fifth_of_the_usual_batches() -> None:
    sizes = {n: len(part_of({"x": torch.ones(n)}, 0.2, 0, 1)["x"]) for n in (1, 2, 8, 16, 32, 64)}
    assert sizes == {1: 1, 2: 1, 8: 2, 16: 3, 32: 6, 64: 13}


@given(
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool]),
    st.lists(st.integers(1, 4), max_size=2),
    st.integers(1, 6),
)
def test_rows_keep_shape_and_type(dtype: torch.dtype, tail: list[int], rows: int) -> None:
    tensor = torch.randint(0, 2, (rows, *tail)).to(dtype)
    part = part_of({"x": tensor}, 0.5, 0, 1)["x"]
    assert part.dtype == dtype
    assert torch.equal(part, tensor[spread(rows, max(1, round(rows / 2)))])


@given(st.integers(1, 9), st.floats(0.01, 1.0), st.integers(1, 4))
def test_pairs_stay_together(pairs: int, fraction: float, n: int) -> None:
    """All the chosen rows, then all the rejected ones; and something with one entry per pair."""
    chosen = torch.arange(pairs)
    batch = {"ids": torch.cat([chosen, chosen + 100])[:, None], "margin": chosen * 10}
    seen = []
    for part in range(n):
        sliced = part_of(batch, fraction, part, n, stacked=2)
        first, second = sliced["ids"][:, 0].chunk(2)
        assert torch.equal(second, first + 100)
        assert torch.equal(sliced["margin"], first * 10)
        seen += first.tolist()
    assert set(seen) == set(spread(pairs, max(1, round(fraction * pairs))))


def test_what_is_not_a_tensor_of_rows_is_passed_on_whole() -> None:
    table, flag = torch.ones(3), torch.tensor(5)
    batch = {"names": ["a", "b"], "x": torch.ones(4, 2), "table": table, "flag": flag, "k": None}
    part = part_of(batch, 0.25, 0, 1)
    assert part["x"].shape == (1, 2)
    assert part["table"] is table
    assert part["flag"] is flag
    assert (part["names"], part["k"]) == (["a", "b"], None)


def test_a_batch_without_tensors_is_refused() -> None:
    with pytest.raises(UserError, match=r"holds no tensor, only \['text'\]; give a dict of"):
        batch_rows({"text": ["a"]})


def padded(lengths: list[int], columns: int) -> Tensor:
    """The mask of rows so long, padded at their ends."""
    return (torch.arange(columns) < torch.tensor(lengths)[:, None]).long()


def test_rows_without_the_longest_of_the_batch_lose_its_padding() -> None:
    mask = padded([3, 5, 30, 9], 30)
    batch = {"input_ids": mask * 7, "attention_mask": mask, "labels": torch.arange(4)}
    part = part_of(batch, 0.5, 0, 1)
    assert torch.equal(part["labels"], torch.tensor([1, 3]))
    assert torch.equal(part["attention_mask"], padded([5, 9], 9))
    assert part["input_ids"].shape == (2, 9)
    assert all(value.is_contiguous() for value in part.values())
    assert part_of(batch, 1.0, 0, 1)["input_ids"].shape == (4, 30)


def test_what_is_cropped_is_padding_alone() -> None:
    mask = padded([2, 9], 20)
    rows = {"attention_mask": mask, "labels": torch.where(mask == 1, 3, -100), "x": torch.ones(2)}
    short = cropped(rows)
    assert short["labels"].shape == short["attention_mask"].shape == (2, 9)
    assert short["x"] is rows["x"]
    counting = torch.zeros(2, 20)
    for labels in (torch.full((2, 20), 3), counting):  # another kind of target, as it happens
        whole = cropped({**rows, "labels": labels})
        assert whole["attention_mask"].shape == whole["labels"].shape == (2, 20)
    left = {"attention_mask": mask.flip(1), "input_ids": mask}
    assert cropped(left)["input_ids"].shape == (2, 20)
    assert cropped({"attention_mask": 0 * mask})["attention_mask"].shape == (2, 20)
    for unknown in ({"input_ids": mask}, {"attention_mask": mask[:, None]}):
        assert all(torch.equal(v, unknown[k]) for k, v in cropped(unknown).items())
