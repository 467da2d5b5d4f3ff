"""What holds a NaN or an infinity is found, whatever its shape and type."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trap2.finite import all_finite

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@given(
    shape=st.lists(st.integers(0, 4), max_size=4),
    dtype=st.sampled_from(DTYPES),
    bad=st.sampled_from([float("nan"), float("inf"), -float("inf"), 0.0]),
    place=st.integers(0, 255),
)
def test_it_says_what_looking_at_every_entry_says(
    shape: list[int], dtype: torch.dtype, bad: float, place: int
) -> None:
    tensor = torch.rand(shape).to(dtype)
    if tensor.numel():
        tensor.view(-1)[place % tensor.numel()] = bad
    assert all_finite(tensor) == bool(torch.isfinite(tensor).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_and_smallest_numbers_are_finite(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    assert all_finite(torch.tensor([info.max, info.min, info.tiny], dtype=dtype))


def test_float8_has_no_extremes_but_an_answer() -> None:
    numbers = torch.tensor([1.0, 2.0, 448.0])
    assert all_finite(numbers.to(torch.float8_e4m3fn))
    assert not all_finite((numbers * torch.nan).to(torch.float8_e4m3fn))
