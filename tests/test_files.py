"""Files are whole or absent, whatever happens in mid-write; digests see every byte."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from trap2.errors import UserError
from trap2.files import (
    LOCK,
    file_digest,
    held,
    nested,
    new_folder,
    read_json,
    refuse_existing,
    weights_digest,
    write_json,
    write_text,
)


def killed(script: str, *arguments: Path) -> None:
    """Run a script that kills itself with SIGKILL."""
    done = subprocess.run([sys.executable, "-c", script, *map(str, arguments)], check=False)
    assert done.returncode == -signal.SIGKILL


@contextmanager
def full_disk(size: int = 1000) -> Iterator[None]:
    """No file may grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """A folder nothing may be written into, for the superuser's tests too."""
    mode = folder.stat().st_mode
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        for parent in [folder, *folder.parents][: len(folder.parts) - 2]:
            parent.chmod(parent.stat().st_mode | 0o055)
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(mode)


def write_and_fail(out: Path, failure: BaseException) -> None:
    with new_folder(out, overwrite=True) as folder:
        (folder / "a").write_text("new")
        raise failure


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r")))
def test_what_is_written_is_read(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    write_text(path, text)
    assert path.read_text(encoding="utf-8") == text
    assert names(path.parent) == ["a.txt"]


def test_json_goes_round_and_refuses_what_json_cannot_say(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"ß": [1, 2.5, None], "b": {"c": True}})
    assert read_json(path) == {"ß": [1, 2.5, None], "b": {"c": True}}
    before = path.read_bytes()
    for bad in ({"a": float("nan")}, {"a": Path("b")}):
        with pytest.raises((ValueError, TypeError)):
            write_json(path, bad)
    assert path.read_bytes() == before


def test_a_kill_before_the_rename_leaves_the_old_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    killed(
        "import os, pathlib, sys\n"
        "from trap2.files import write_text\n"
        "os.fsync = lambda _: os.kill(os.getpid(), 9)\n"
        "write_text(pathlib.Path(sys.argv[1]), 'new')",
        path,
    )
    assert path.read_text() == "old"
    write_text(path, "newer")
    assert names(tmp_path) == ["a.txt"]
    assert path.read_text() == "newer"


def test_a_full_disk_leaves_the_old_text_and_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with full_disk(), pytest.raises(UserError) as caught:
        write_text(path, "x" * 5000)
    assert str(caught.value) == (
        f"cannot write {path}: File too large; free space or choose another place"
    )
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_place_that_cannot_be_written_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^cannot write .*free space or choose another place$"):
        write_text(tmp_path / "file" / "a.txt", "x")
    with pytest.raises(UserError, match=r"^cannot write .*No such file or directory"):
        write_text(tmp_path / "nowhere" / "a.txt", "x")
    with pytest.raises(UserError, match=r"^cannot write .*free space or choose another place$"):
        write_text(tmp_path, "x")
    with (
        read_only(tmp_path),
        pytest.raises(UserError, match=r"^cannot write .*Permission denied"),
    ):
        write_text(tmp_path / "a.txt", "x")
    with (
        read_only(tmp_path),
        pytest.raises(UserError, match=r"^cannot write .*Permission denied"),
        new_folder(tmp_path / "out"),
    ):
        pass
    assert names(tmp_path) == ["file"]


def test_a_folder_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with new_folder(out) as folder:
        (folder / "a").write_text("1")
        assert not out.exists()
    assert names(out) == ["a"]
    assert names(out.parent) == ["out"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError, UserError])
def test_a_failure_in_mid_write_leaves_no_folder(
    tmp_path: Path, failure: type[BaseException]
) -> None:
    with pytest.raises(failure, match="stop"):
        write_and_fail(tmp_path / "out", failure("stop"))
    assert names(tmp_path) == []


def test_a_failure_in_mid_write_leaves_the_old_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with new_folder(out) as folder:
        (folder / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        write_and_fail(out, KeyboardInterrupt())
    assert (out / "a").read_text() == "old"
    with new_folder(out, overwrite=True) as folder:
        (folder / "b").write_text("new")
        assert (out / "a").read_text() == "old"
    assert names(out) == ["b"]
    assert names(tmp_path) == ["out"]


def test_a_kill_in_mid_write_leaves_the_old_folder_and_does_not_block(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with new_folder(out) as folder:
        (folder / "a").write_text("old")
    killed(
        "import os, pathlib, sys\n"
        "from trap2.files import new_folder\n"
        "with new_folder(pathlib.Path(sys.argv[1]), overwrite=True) as folder:\n"
        "    (folder / 'a').write_text('half')\n"
        "    os.kill(os.getpid(), 9)",
        out,
    )
    assert (out / "a").read_text() == "old"
    assert names(tmp_path) == ["out", "out.partial"]
    with new_folder(out, overwrite=True) as folder:
        assert names(folder) == []
        (folder / "a").write_text("new")
    assert (out / "a").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_a_full_disk_leaves_no_folder(tmp_path: Path) -> None:
    weights = {"w": np.zeros(4000, dtype=np.float32)}
    with pytest.raises(UserError) as caught, full_disk(), new_folder(tmp_path / "out") as folder:
        save_file(weights, folder / "model.safetensors")
    assert str(caught.value).startswith(f"cannot write {tmp_path / 'out'}: ")
    assert str(caught.value).endswith("; free space or choose another place")
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == []


def test_what_is_there_is_refused_without_overwrite(tmp_path: Path) -> None:
    out = tmp_path / "out"
    refuse_existing(out, overwrite=False)
    out.mkdir()
    refuse_existing(out, overwrite=False)
    (out / "a").write_text("mine")
    with pytest.raises(UserError) as caught, new_folder(out):
        pass
    assert str(caught.value) == (
        f"{out} exists already; pass --overwrite or choose another output folder"
    )
    assert (out / "a").read_text() == "mine"
    refuse_existing(out, overwrite=True)
    for overwrite in (False, True):
        with pytest.raises(UserError) as caught:
            refuse_existing(out / "a", overwrite)
        assert str(caught.value) == (
            f"{out / 'a'} is a file, not a folder; choose another output folder"
        )


@given(content=st.binary(min_size=1, max_size=40), at=st.integers(0, 39), bit=st.integers(0, 7))
def test_digests_change_with_one_bit(
    content: bytes, at: int, bit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("digest")
    path = folder / "model.safetensors"
    path.write_bytes(content)
    file, whole = file_digest(path), weights_digest(folder)
    assert file.startswith("sha256:")
    assert len(file) == len("sha256:") + 64
    assert (file_digest(path), weights_digest(folder)) == (file, whole)
    changed = bytearray(content)
    changed[at % len(content)] ^= 1 << bit
    path.write_bytes(changed)
    assert file_digest(path) != file
    assert weights_digest(folder) != whole


def test_the_digest_of_a_folder_sees_weight_files_and_their_names_only(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"1")
    one = weights_digest(tmp_path)
    (tmp_path / "README.md").write_text("words")
    assert weights_digest(tmp_path) == one
    (tmp_path / "a.safetensors").rename(tmp_path / "b.safetensors")
    assert weights_digest(tmp_path) != one


@pytest.mark.parametrize(
    ("content", "reason"),
    [("[1]", "holds a list, not an object"), ("{", "is not valid JSON"), ("", "is not valid JSON")],
)
def test_a_broken_json_file_is_said_in_one_line(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        read_json(path)
    assert reason in str(caught.value)
    assert str(caught.value).endswith("; write it again")
    assert "\n" not in str(caught.value)


def test_a_missing_json_file_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_json(tmp_path / "a.json")
    assert str(caught.value) == (
        f"cannot read {tmp_path / 'a.json'}: No such file or directory; check the path"
    )


def test_nested_finds_what_is_there_and_nothing_where_something_else_stands():
    record = {"a": {"b": [1]}, "c": "text", "d": None}
    assert nested(record, "a", "b") == [1]
    assert nested(record) == record
    for keys in (("a", "x"), ("c", "x"), ("d", "x", "y"), ("a", "b", "0")):
        assert nested(record, *keys) is None


HOLDING = """
import os, signal, sys
from pathlib import Path
from trap2.files import held
with held(Path(sys.argv[1])):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_folder_is_held_by_one_at_a_time(tmp_path):
    folder = tmp_path / "deep" / "out"
    with held(folder):
        assert [p.name for p in folder.iterdir()] == [LOCK]
        with (
            pytest.raises(UserError, match=f"{folder} is in use by another process; wait for it"),
            held(folder),
        ):
            raise AssertionError
        assert [p.name for p in folder.iterdir()] == [LOCK]
    assert list(tmp_path.iterdir()) == []  # it stayed empty
    with held(folder):
        (folder / "result").touch()
    assert [p.name for p in folder.iterdir()] == ["result"]


def test_a_hold_ends_with_its_process(tmp_path):
    killed(HOLDING, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [LOCK]
    with held(tmp_path):
        (tmp_path / "result").touch()
    assert [p.name for p in tmp_path.iterdir()] == ["result"]


def test_a_hold_on_a_lock_that_is_just_being_removed_is_none(tmp_path, monkeypatch):
    import fcntl

    def removed(stream, operation):
        (tmp_path / LOCK).unlink()

    monkeypatch.setattr(fcntl, "flock", removed)
    with pytest.raises(UserError, match="is in use by another process"), held(tmp_path):
        raise AssertionError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_held_is_refused(tmp_path):
    with (
        read_only(tmp_path),
        pytest.raises(UserError, match=f"cannot write {tmp_path}: Permission denied; free space"),
        held(tmp_path),
    ):
        raise AssertionError
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file, not a folder"), held(tmp_path / "file"):
        raise AssertionError
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_some_names_are_no_result(tmp_path):
    (tmp_path / "ledger").touch()
    refuse_existing(tmp_path, overwrite=False, besides=("ledger",))
    with pytest.raises(UserError, match="exists already"):
        refuse_existing(tmp_path, overwrite=False)
