"""A checkpoint is safetensors, whole and finite, inside its folder; pickles are never opened."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from trap2.checkpoint import PICKLES, Checkpoint
from trap2.errors import UserError

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64])
FILE = "model.safetensors"
TENSORS = {"b.weight": torch.arange(6.0).reshape(2, 3), "a.weight": torch.ones(4)}


class Trigger:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return (exec, (f"open({str(self.marker)!r}, 'w').close()",))


def sharded(folder: Path, shards: list[dict[str, torch.Tensor]], **extra: str) -> Path:
    """Write shards and their index; `extra` adds entries to the weight map."""
    weight_map = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": {**weight_map, **extra}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def refusal(folder: Path, name: str | None = None) -> str:
    """The one-line message with which a folder, or one of its tensors, is refused."""
    with pytest.raises(UserError) as caught:
        Checkpoint(folder).tensor(name or "a.weight")
    message = str(caught.value)
    assert "\n" not in message
    return message


@given(
    shape=st.lists(st.integers(0, 4), max_size=4),
    dtype=DTYPES,
    names=st.sets(st.text("ab."), max_size=3),
)
def test_tensors_are_read_as_they_are_stored(
    shape: list[int],
    dtype: torch.dtype,
    names: set[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("weights")
    tensors = {n: (torch.rand(shape) * 9).to(dtype) for n in sorted({"w", *names} - {""})}
    save_file(tensors, folder / "model.safetensors")
    checkpoint = Checkpoint(folder)
    assert checkpoint.names == tuple(sorted(tensors))
    for name, tensor in tensors.items():
        read = checkpoint.tensor(name)
        assert name in checkpoint
        assert checkpoint.shape(name) == tuple(shape)
        assert read.dtype == dtype
        assert torch.equal(read, tensor)


def test_shards_read_like_one_file(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    save_file(TENSORS, whole / "model.safetensors")
    sharded(parts, [{name: tensor} for name, tensor in TENSORS.items()])
    one, two = Checkpoint(whole), Checkpoint(parts)
    assert one.names == two.names == ("a.weight", "b.weight")
    assert all(torch.equal(one.tensor(name), two.tensor(name)) for name in one.names)
    assert one.digest != two.digest


def test_one_file_goes_before_a_stale_index(tmp_path: Path) -> None:
    save_file(TENSORS, sharded(tmp_path, [{"old.weight": torch.ones(1)}]) / "model.safetensors")
    assert Checkpoint(tmp_path).names == ("a.weight", "b.weight")


def test_an_adapter_file_is_found_by_its_stem(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "adapter_model.safetensors")
    assert Checkpoint(tmp_path, "adapter_model").names == ("a.weight", "b.weight")
    with pytest.raises(UserError) as caught:
        Checkpoint(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} holds no model.safetensors; give a folder of released weights"
    )


@pytest.mark.parametrize("pattern", PICKLES)
def test_a_pickle_is_refused_and_never_opened(tmp_path: Path, pattern: str) -> None:
    name, marker = pattern.replace("*", "pytorch_model"), tmp_path / "opened"
    (tmp_path / name).write_bytes(pickle.dumps(Trigger(marker)))
    message = refusal(tmp_path)
    assert message == (
        f"{tmp_path / name} is a pickle, which can run code when opened, and is refused; if you "
        "trust its author, load it with transformers and save it again with "
        "save_pretrained(..., safe_serialization=True)"
    )
    assert not marker.exists()


def test_a_pickle_beside_safetensors_is_ignored(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Trigger(tmp_path / "opened")))
    assert torch.equal(Checkpoint(tmp_path).tensor("a.weight"), TENSORS["a.weight"])
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize("file", ["../x.safetensors", "sub/x.safetensors", "..", "", "gone"])
def test_an_index_may_not_point_outside_or_at_nothing(tmp_path: Path, file: str) -> None:
    folder = tmp_path / "release"
    (folder / "sub").mkdir(parents=True)
    for outside in (tmp_path, folder / "sub"):
        save_file({"a.weight": torch.ones(1)}, outside / "x.safetensors")
    sharded(folder, [TENSORS], **{"c.weight": file})
    assert refusal(folder) == (
        f"{folder} lists a weight file '{file}' that is not there; download it again"
    )


@pytest.mark.parametrize("absolute", [True, False])
def test_an_index_may_not_name_a_path_or_a_number(tmp_path: Path, absolute: bool) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors")
    file: object = str(tmp_path / "x.safetensors") if absolute else 3
    index = {"weight_map": {"a.weight": file}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refusal(tmp_path).endswith("that is not there; download it again")


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": ["a"]}])
def test_an_index_without_weights_is_refused(tmp_path: Path, index: object) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    assert refusal(tmp_path) == f"{path} lists no weights; download it again"


def test_an_index_that_lists_a_tensor_its_shard_lacks_is_refused(tmp_path: Path) -> None:
    file = "model-00001-of-00001.safetensors"
    checkpoint = Checkpoint(sharded(tmp_path, [TENSORS], **{"c.weight": file}))
    for read in (checkpoint.shape, checkpoint.tensor):
        with pytest.raises(UserError) as caught:
            read("c.weight")
        assert str(caught.value).startswith(f"cannot read 'c.weight' in {tmp_path / file}: ")
        assert str(caught.value).endswith("; download it again")


def test_a_tensor_that_is_not_there_is_refused(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert refusal(tmp_path, "z") == f"{tmp_path} lacks tensor 'z'; download it again"


@pytest.mark.parametrize("kept", [0, 4, 30, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[:kept])
    message = refusal(tmp_path)
    assert message.startswith(f"cannot read {path}: ")
    assert message.endswith("; download it again")


def test_a_truncated_shard_is_refused_when_it_is_read(tmp_path: Path) -> None:
    sharded(tmp_path, [{"a.weight": torch.ones(3)}, {"b.weight": torch.ones(3)}])
    path = tmp_path / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    assert torch.equal(Checkpoint(tmp_path).tensor("a.weight"), torch.ones(3))
    assert refusal(tmp_path, "b.weight").startswith(f"cannot read {path}: ")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_broken_numbers_are_refused(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    broken = torch.ones(5, dtype=dtype)
    broken[3] = value
    save_file({"a.weight": broken}, tmp_path / "model.safetensors")
    assert refusal(tmp_path) == (
        f"tensor 'a.weight' in {tmp_path} holds NaN or infinity; the weights are broken, train or "
        "download them again"
    )


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "nowhere", tmp_path / "file"):
        assert refusal(path) == f"{path} is not a folder; give a folder of released weights"


def test_what_is_done_to_a_tensor_that_was_read_does_not_reach_the_next_reading(
    tmp_path: Path,
) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    checkpoint.tensor("a.weight").zero_()
    assert torch.equal(checkpoint.tensor("a.weight"), TENSORS["a.weight"])


@pytest.mark.parametrize("in_place", [True, False])
def test_a_file_that_changed_is_read_anew(tmp_path: Path, in_place: bool) -> None:
    file = tmp_path / "model.safetensors"
    save_file(TENSORS, file)
    checkpoint = Checkpoint(tmp_path)
    assert torch.equal(checkpoint.tensor("a.weight"), TENSORS["a.weight"])
    other = {name: tensor[:1] + 1 for name, tensor in TENSORS.items()}
    save_file(other, tmp_path / "new")
    if in_place:
        file.write_bytes((tmp_path / "new").read_bytes())
    else:
        (tmp_path / "new").rename(file)
    for name, tensor in other.items():
        assert torch.equal(checkpoint.tensor(name), tensor)


def test_a_file_that_is_gone_says_so(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"cannot read .*; download it again") as caught:
        checkpoint.tensor("a.weight")
    assert "\n" not in str(caught.value)


def test_a_file_is_opened_once_for_many_tensors_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({f"{place}.weight": torch.ones(256) for place in range(8)}, tmp_path / FILE)
    opened: list[str] = []
    monkeypatch.setattr(
        "trap2.checkpoint.safe_open",
        lambda path, framework: opened.append(path) or safe_open(path, framework=framework),
    )

    def times() -> int:
        checkpoint = Checkpoint(tmp_path)
        opened.clear()
        for name in checkpoint.names:
            assert checkpoint.shape(name) == (256,)
            assert torch.equal(checkpoint.tensor(name), torch.ones(256))
        return len(opened)

    assert times() == 1
    monkeypatch.setattr("trap2.checkpoint.HELD", 2047)  # bytes; two tensors are 2048
    assert times() == 4
