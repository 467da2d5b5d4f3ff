"""The ledger: bits come back, kills and full disks lose nothing, other content is never found."""

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pico
from auditing.shelf import ATTACKER
from test_files import full_disk, killed, read_only
from trap2.auditing.audit import audit
from trap2.auditing.contents import Content
from trap2.auditing.ledger import Ledger
from trap2.errors import UserError
from trap2.files import LEDGER, UNFINISHED
from trap2.progress import Progress
from trap2.recipes import AuditSpec

SMALL = {"attacks": ["task_arithmetic"], "t3_attacks": [], "relabel_rows": [6]}


def content(number: int = 0, **places: str) -> Content:
    return Content(json.dumps({"number": number}), places or {"a": "1"})


def logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(24, 3, generator=torch.Generator().manual_seed(seed))


def recorded(folder: Path) -> int:
    with sqlite3.connect(folder / LEDGER) as database:
        return database.execute("SELECT count(*) FROM evaluations").fetchone()[0]


def same(report, other) -> bool:
    """Whether two records are the same, byte for byte, but for the times."""
    first, second = (r.model_dump_json(exclude={"created", "seconds"}) for r in (report, other))
    assert json.loads(first) == json.loads(second)  # says what differs
    return first == second


def test_logits_come_back_to_the_bit(tmp_path):
    strange = logits()
    strange[0] = torch.tensor([torch.nan, torch.inf, -0.0])
    with Ledger(tmp_path) as ledger:
        assert ledger.get(content(), 24) is None
        assert list(tmp_path.iterdir()) == []
        ledger.put(content(), strange)
        ledger.put(content(), logits(1))  # what is there stays
    with Ledger(tmp_path) as ledger:
        found = ledger.get(content(), 24)
        assert ledger.get(content(1), 24) is None
    assert found.dtype == torch.float32
    assert found.numpy().tobytes() == strange.numpy().tobytes()
    assert [p.name for p in tmp_path.iterdir()] == [LEDGER]


def test_several_audits_write_into_one_ledger(tmp_path):
    with Ledger(tmp_path) as one, Ledger(tmp_path) as other:
        for number in range(6):
            (one if number % 2 else other).put(content(number), logits(number))
        for number in range(6):
            assert torch.equal(one.get(content(number), 24), logits(number))
            assert torch.equal(other.get(content(number), 24), logits(number))


TORN = """
import os, signal, sqlite3, sys
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("PRAGMA cache_size=1")  # pages reach the file before the commit
database.execute("BEGIN")
for number in range(50):
    row = (str(number), "{}", "{}", os.urandom(5000))
    database.execute("INSERT INTO evaluations VALUES (?, ?, ?, ?)", row)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_write_torn_by_a_kill_is_as_if_it_had_not_begun(tmp_path):
    with Ledger(tmp_path) as ledger:
        ledger.put(content(), logits())
    size = (tmp_path / LEDGER).stat().st_size
    killed(TORN, tmp_path / LEDGER)
    assert (tmp_path / LEDGER).stat().st_size > size
    assert {p.name for p in tmp_path.iterdir()} <= {*UNFINISHED}
    with Ledger(tmp_path) as ledger:
        assert torch.equal(ledger.get(content(), 24), logits())
        ledger.put(content(1), logits(1))
    assert recorded(tmp_path) == 2


HUNDRED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from trap2.auditing.contents import Content
from trap2.auditing.ledger import Ledger

def logits(number):
    return torch.full((300, 100), float(number))

def whole(numbers):
    with Ledger(folder) as ledger:
        found = [(n, ledger.get(Content(f'"{n}"', {"a": "1"}), 300)) for n in numbers]
    return sum(f is not None and bool((f == n).all()) for n, f in found)

def write(first, said):
    with Ledger(folder) as ledger:
        for number in range(first, first + 10_000):
            os.write(said, b"<")
            ledger.put(Content(f'"{number}"', {"a": "1"}), logits(number))
            os.write(said, b">")

folder, draw, first, torn = Path(sys.argv[1]), random.Random(0), 0, 0
for kill in range(100):
    reading, said = os.pipe()
    child = os.fork()
    if not child:
        write(first, said)
    heard = os.read(reading, 1)
    time.sleep(draw.uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(said)
    heard += os.read(reading, 1 << 20)
    os.close(reading)
    begun, ended = heard.count(b"<"), heard.count(b">")
    torn += begun - ended
    there = whole(range(first, first + begun))
    assert ended <= there <= begun, (kill, ended, there, begun)
    first += there
print(first, whole(range(first)), torn)
"""


def test_a_hundred_kills_at_random_points_lose_no_row_that_was_written(tmp_path):
    """Most of them fall into a write: the child does nothing else."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", HUNDRED, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows, whole, torn = map(int, done.stdout.split())
    assert rows == whole == recorded(tmp_path)
    assert torn
    with sqlite3.connect(tmp_path / LEDGER) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_full_disk_is_said_and_loses_nothing(tmp_path):
    with Ledger(tmp_path) as ledger:
        ledger.put(content(), logits())
    size = (tmp_path / LEDGER).stat().st_size

    def fill() -> None:
        with full_disk(size), Ledger(tmp_path) as ledger:
            for number in range(1, 50):
                ledger.put(content(number), logits())

    with pytest.raises(UserError, match=r"evaluations.sqlite: .*; free space or choose") as caught:
        fill()
    assert str(caught.value).endswith("run it again: what was recorded is kept")
    kept = recorded(tmp_path)
    assert 1 <= kept < 50
    with Ledger(tmp_path) as ledger:
        assert torch.equal(ledger.get(content(kept - 1), 24), logits())
        ledger.put(content(99), logits(9))
        assert torch.equal(ledger.get(content(99), 24), logits(9))


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    with (
        read_only(tmp_path),
        Ledger(tmp_path / "deep") as ledger,
        pytest.raises(UserError, match=f"cannot use {tmp_path}.*: Permission denied; free space"),
    ):
        ledger.put(content(), logits())
    assert list(tmp_path.iterdir()) == []


def test_a_ledger_that_cannot_be_written_is_still_read(tmp_path):
    with Ledger(tmp_path) as ledger:
        ledger.put(content(), logits())
    (tmp_path / LEDGER).chmod(0o444)
    with read_only(tmp_path), Ledger(tmp_path) as ledger:
        assert torch.equal(ledger.get(content(), 24), logits())
        with pytest.raises(UserError, match="attempt to write a readonly database; free space"):
            ledger.put(content(1), logits())


def test_what_is_no_ledger_is_refused_and_left_alone(tmp_path):
    (tmp_path / LEDGER).write_text("not a database, but longer than its header would be" * 9)
    before = (tmp_path / LEDGER).read_bytes()
    with (
        Ledger(tmp_path) as ledger,
        pytest.raises(UserError, match=r"is damaged: file is not a database; delete it, its eval"),
    ):
        ledger.get(content(), 24)
    assert (tmp_path / LEDGER).read_bytes() == before


def test_what_changed_is_named_with_what_it_costs(tmp_path):
    with Ledger(tmp_path) as ledger:
        assert list(ledger.outdated({"a": "1"})) == []
        for number in range(5):
            ledger.put(content(number, a="1", b="1"), logits())
        for number in range(5, 8):
            ledger.put(content(number, b="1"), logits())
        ledger.put(content(8, elsewhere="1", b="9"), logits())
        assert list(ledger.outdated({"a": "1", "b": "1", "c": "1"})) == []
        assert list(ledger.outdated({"a": "2", "b": "1", "c": "1"})) == [
            "a changed since: 5 of 8 recorded evaluations no longer apply"
        ]
        ledger.put(content(9, a="2", b="1"), logits())
        for known in "12":
            assert list(ledger.outdated({"a": known, "b": "1"})) == []


class Dying(Ledger):
    """A ledger whose process dies at its n-th row: just before it is written, or just after."""

    def __init__(self, folder: Path, nth: int, written: bool) -> None:
        super().__init__(folder)
        self.left, self.written = nth, written

    def put(self, content, logits):
        self.left -= 1
        if self.left or self.written:
            super().put(content, logits)
        if not self.left:
            raise KeyboardInterrupt


def test_an_audit_cut_short_at_every_evaluation_ends_in_the_same_record(shelf, tmp_path):
    settings = shelf.audit("lora", **SMALL, coefficients=[0.5, 1.0])
    spec = AuditSpec.model_validate({**settings, "scales": [0.0, 1.0]})
    whole = audit(spec)
    interruptions = 0
    for attempt in range(200):
        try:
            with Dying(tmp_path, 2 if attempt % 2 else 1, bool(attempt % 2)) as ledger:
                report = audit(spec, ledger=ledger)
            break
        except KeyboardInterrupt:
            interruptions += 1
    assert interruptions >= recorded(tmp_path) == whole.rows["evaluations"]
    assert same(report, whole)


def test_a_whole_audit_cut_short_ends_in_the_same_record(reports, shelf, tmp_path):
    spec, ticks = AuditSpec.model_validate(shelf.audit("full")), []
    for rows in (7, 31):
        with pytest.raises(KeyboardInterrupt), Dying(tmp_path, rows, True) as dying:
            audit(spec, ledger=dying)
    with Ledger(tmp_path) as ledger:
        again = audit(spec, Progress(lambda text: None, lambda: ticks.append(1)), ledger)
    assert same(again, reports["full"])
    assert len(ticks) == again.rows["evaluations"] == recorded(tmp_path)


KILLS = """
import os, random, signal, sys, time
import trap2.auditing.audit, trap2.reporting.html, trap2.reporting.text  # once, for all children
from trap2.cli import main

def child():
    pid = os.fork()
    if not pid:
        os._exit(main(sys.argv[1:]))
    return pid

def size():
    return os.path.getsize(ledger) if os.path.exists(ledger) else 0

ledger, draw = sys.argv[-1] + "/evaluations.sqlite", random.Random(0)
for _ in range(int(os.environ["KILLS"])):
    wanted = size() + draw.randint(1, int(os.environ["GROWTH"]))
    pid = child()
    while size() < wanted:
        time.sleep(0.001)
    time.sleep(draw.uniform(0, 0.03))  # while a row is computed, or while it is written
    os.kill(pid, signal.SIGKILL)
    print("killed" if os.WIFSIGNALED(os.waitpid(pid, 0)[1]) else "ended", flush=True)
print(os.waitstatus_to_exitcode(os.waitpid(child(), 0)[1]), flush=True)
"""


STANDARD = {
    "suite": "standard-v1",
    "relabel_rows": [6],
    "validation_rows": 24,
    "test_rows": 24,
}


@pytest.mark.parametrize(
    ("attacker", "kills", "growth"),
    [
        ({**ATTACKER, **SMALL}, 3, 6_000),
        pytest.param(
            STANDARD,
            8,
            1_000_000,
            marks=pytest.mark.skipif(
                "TRAP2_SLOW" not in os.environ, reason="takes minutes; set TRAP2_SLOW=1 to run it"
            ),
        ),
    ],
)
def test_an_audit_killed_again_and_again_ends_in_the_same_record(
    shelf, tmp_path, attacker, kills, growth
):
    """The kills are spread over a ledger that grows by up to so many bytes between them."""
    settings = {**shelf.audit("lora"), "attacker": attacker}
    path = pico.write_yaml(tmp_path / "audit.yaml", settings)
    out = tmp_path / "out"
    command = [sys.executable, "-W", "ignore", "-c", KILLS, "audit", str(path), "--out", str(out)]
    threads = str(torch.get_num_threads())
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "GROWTH": str(growth)}
    environment["KILLS"] = str(kills)
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, check=True, timeout=3000
    )
    said = done.stdout.split("\n")
    assert said[:kills] == ["killed"] * kills
    assert said[-2] == "0", done.stderr
    assert sorted(p.name for p in out.iterdir()) == [LEDGER, "report.html", "report.json"]
    written = json.loads((out / "report.json").read_text())
    expected = audit(AuditSpec.model_validate(settings)).model_dump(mode="json")
    for record in (written, expected):
        del record["created"], record["seconds"]
    assert json.dumps(written) == json.dumps(expected)


def test_partners_and_control_are_evaluated_once_for_several_audits(shelf, tmp_path):
    whole = AuditSpec.model_validate(shelf.audit("lora", **SMALL))
    swapped = shelf.audit("lora", **SMALL)
    swapped["release"]["path"], swapped["control"] = swapped["control"], swapped["release"]["path"]
    with Ledger(tmp_path) as ledger:
        audit(whole, ledger=ledger)
        before = recorded(tmp_path)
        report = audit(AuditSpec.model_validate(swapped), ledger=Dying(tmp_path, 1, False))
    assert recorded(tmp_path) == before
    assert same(report, audit(AuditSpec.model_validate(swapped)))


def test_a_changed_release_is_said_and_evaluated_anew(shelf, tmp_path):
    settings = shelf.audit("lora", **SMALL)
    copy = shutil.copytree(settings["release"]["path"], tmp_path / "release")
    settings["release"]["path"] = str(copy)
    spec, notes = AuditSpec.model_validate(settings), []
    progress = Progress(lambda text: None, lambda: None, notes.append)
    with Ledger(tmp_path) as ledger:
        audit(spec, progress, ledger)
        assert notes == []
        before = recorded(tmp_path)
        tensors = load_file(copy / "adapter_model.safetensors")
        save_file({n: 0.5 * t for n, t in tensors.items()}, copy / "adapter_model.safetensors")
        report = audit(spec, progress, ledger)
    again = recorded(tmp_path) - before
    (note,) = notes
    told = re.fullmatch(
        rf"{copy} changed since: (\d+) of {before} recorded evaluations no longer apply", note
    )
    assert told is not None
    assert 0 < int(told[1]) < before  # those of control and partners still apply
    assert 0 < again < before
    assert same(report, audit(spec))
