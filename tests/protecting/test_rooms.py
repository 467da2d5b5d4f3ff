"""Rooms are like what they are for, lie apart, and take memory while they are open alone."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from trap2.protecting import rooms
from trap2.protecting.rooms import Rooms
from trap2.protecting.scaled import LiveUpdate

SHAPES = st.lists(st.integers(0, 5), min_size=0, max_size=4)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
MEGABYTE = 2**20


@given(st.lists(st.tuples(SHAPES, DTYPES, st.booleans()), max_size=6), st.booleans())
def test_rooms_are_like_their_tensors_and_do_not_overlap(
    wanted: list[tuple[list[int], torch.dtype, bool]], small: bool
) -> None:
    tensors = [torch.zeros(shape, dtype=dtype) for shape, dtype, _ in wanted]
    tensors = [
        t.transpose(0, -1) if turned and t.dim() > 1 else t
        for t, (_, _, turned) in zip(tensors, wanted, strict=True)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rooms, "PAGE", 2**21 if small else 1)
        with Rooms(tensors).open() as opened:
            for number, (room, tensor) in enumerate(zip(opened, tensors, strict=True)):
                assert room.shape == tensor.shape
                assert not room.numel() or room.stride() == torch.empty_like(tensor).stride()
                assert room.dtype == tensor.dtype
                room.fill_(number)
            assert all(bool((room == n).all()) for n, room in enumerate(opened))


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="no /proc: not Linux")
def test_memory_is_taken_while_rooms_are_open_alone() -> None:
    tensors: list[Tensor] = [torch.zeros(16 * MEGABYTE // 4) for _ in range(4)]
    found = Rooms(tensors)
    for _ in range(3):
        before = resident()
        with found.open() as opened:
            for room in opened:
                room.fill_(1.0)
            assert resident() - before > 60 * MEGABYTE
        assert resident() - before < 8 * MEGABYTE


@pytest.mark.parametrize("page", [1, 2**40])
def test_an_update_is_scaled_alike_in_a_region_and_without_one(
    page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rooms, "PAGE", page)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2))
    model = model.to(memory_format=torch.channels_last)
    update = LiveUpdate(model)
    starts = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    ends = [p.detach().clone() for p in model.parameters()]
    x = torch.randn(4, 2, 4, 4)
    for s in (0.25, 1.5):
        with update.at(s):
            assert all(
                torch.equal(p, start.lerp(end, s))
                for p, start, end in zip(model.parameters(), starts, ends, strict=True)
            )
            model(x).sum().backward()
        assert all(torch.equal(p, end) for p, end in zip(model.parameters(), ends, strict=True))
