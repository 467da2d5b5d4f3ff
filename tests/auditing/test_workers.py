"""Several workers: the record is that of one process, whoever dies; Ctrl-C leaves none behind."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from threading import Thread

import psutil
import pytest
import torch
from joblib.externals.loky import get_reusable_executor

import pico
from auditing.test_ledger import SMALL, recorded, same
from test_cli import unblock
from trap2.attacks.attack import ATTACKS, attack
from trap2.auditing import workers
from trap2.auditing.arena import CONTROL, RELEASE, Arena, Done, Job, Mixture
from trap2.auditing.audit import audit
from trap2.auditing.ledger import Ledger
from trap2.auditing.workers import Workers
from trap2.errors import UserError
from trap2.files import LEDGER
from trap2.progress import SILENT, Progress
from trap2.recipes import AuditSpec

LINE = {"coefficients": [round(0.02 * k, 2) for k in range(1, 81)], "relabel_rows": []}
"""A grid that is not done in the blink of an eye."""

PATIENCE = 240


class Here:
    """A crew that does its jobs in this process, the last one first, as a worker does them."""

    def __init__(self, spec: AuditSpec, count: int = 3) -> None:
        self.spec, self.count, self.done = spec.model_dump_json(), count, 0

    def __call__(self, jobs: Sequence[Job]) -> Iterator[tuple[Mixture, Done]]:
        for job in reversed(jobs):
            home = workers._home(job[0].attack)
            yield workers._work(self.spec, os.getpid(), torch.get_num_threads(), home, job)
            self.done += 1


def alive(parent: int, name: str) -> list[psutil.Process]:
    """The processes below one that do its jobs, by a part of their command line."""
    found = []
    for process in psutil.Process(parent).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # ended in the meantime, or not yet buried
            if any(name in part for part in process.cmdline()):
                found.append(process)
    return found


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_whatever_is_prepared_the_record_is_that_of_one_process(shelf, tmp_path):
    given = {
        "attacks": ["task_arithmetic", "slerp"],
        "t3_attacks": ["task_arithmetic"],
        "data_attacks": ["regmean"],
        "relabel_rows": [6],
        "refine": 1,
    }
    spec, ticks = AuditSpec.model_validate(shelf.audit("full", **given)), []
    crew = Here(spec)
    with Ledger(tmp_path) as ledger:
        report = audit(spec, Progress(lambda text: None, lambda: ticks.append(1)), ledger, crew)
    assert same(report, audit(spec))
    # Partners of the next few by rank may be for nothing.
    made, done = report.rows["evaluations"], crew.done
    assert made <= recorded(tmp_path) == len(ticks) < 1.1 * made
    with Ledger(tmp_path) as ledger:
        assert same(audit(spec, ledger=ledger, crew=crew), report)
    assert crew.done == done


def test_the_grids_are_known_beforehand(shelf, tmp_path):
    """After the first call only what depends on choices is asked for: partners, and test rows."""
    spec, later = AuditSpec.model_validate(shelf.audit("lora", **{**SMALL, "refine": 0})), []

    class Noting(Here):
        def __call__(self, jobs):
            later.extend(reading for _, readings in jobs for reading in readings if self.done)
            return super().__call__(jobs)

    with Ledger(tmp_path) as ledger:
        audit(spec, ledger=ledger, crew=Noting(spec))
    assert later
    assert not [r for r in later if r in ((RELEASE, "validation"), (CONTROL, "validation"))]


def test_a_worker_that_reads_something_else_is_found_out(shelf, tmp_path):
    spec = AuditSpec.model_validate(shelf.audit("lora", **SMALL))
    other = shelf.audit("lora", **SMALL)
    other["release"]["path"] = other["control"]
    with (
        Ledger(tmp_path) as ledger,
        pytest.raises(UserError, match=r"a worker did not read what this process reads for Mix"),
    ):
        audit(spec, SILENT, ledger, Here(AuditSpec.model_validate(other)))


def test_workers_without_a_ledger_are_refused(shelf):
    spec = AuditSpec.model_validate(shelf.audit("lora", **SMALL))
    with pytest.raises(UserError, match="several workers meet in a ledger; give one, or do with"):
        Arena(spec, crew=Here(spec))


def test_an_attack_that_workers_cannot_find_is_refused(monkeypatch):
    monkeypatch.setattr(ATTACKS, "_entries", dict(ATTACKS._entries))

    def mine(updates, coefficients):
        return updates[0].items()

    mine.__module__ = "__main__"
    attack("mine", paper="")(mine)
    with pytest.raises(UserError, match="attack 'mine' is defined in the script that is run, wh"):
        workers._home("mine")


def test_a_worker_killed_then_ctrl_c_then_one_process(shelf, tmp_path):
    """The three of them on one audit: what died is done again, no worker outlives its audit."""
    settings = shelf.audit("lora", **{**SMALL, **LINE})
    path, out = pico.write_yaml(tmp_path / "audit.yaml", settings), tmp_path / "out"
    command = [sys.executable, "-W", "ignore", "-m", "trap2", "audit", str(path)]
    command += ["--out", str(out), "--workers", "2"]
    running = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=unblock,
    )

    def rows() -> int:
        with suppress(sqlite3.OperationalError):  # not there yet, or busy
            return recorded(out) if (out / LEDGER).is_file() else 0
        return 0

    def crew() -> list[psutil.Process]:
        return alive(running.pid, "LokyProcess")

    with running:
        until(lambda: len(crew()) == 2 and rows())
        first = crew()
        first[0].kill()

        def others() -> list[psutil.Process]:  # not by their rows: who counts those has to wait
            return [p for p in crew() if p.pid not in {old.pid for old in first}]

        until(lambda: len(others()) == 2)
        second = crew()
        running.send_signal(signal.SIGINT)
        said = running.communicate(timeout=PATIENCE)[1]
    assert running.returncode == 130, said
    assert said.splitlines()[-1] == "trap2: interrupted; what was finished is kept"
    assert len(first) == len(second) == 2
    assert not {p.pid for p in first} & {p.pid for p in second}
    assert not [p for p in (*first, *second) if p.is_running()]
    assert [p.name for p in out.iterdir()] == [LEDGER]
    spec = AuditSpec.model_validate(settings)
    with Ledger(out) as ledger:
        report = audit(spec, ledger=ledger)
    assert same(report, audit(spec))


ORPHAN = """
import os, signal
from trap2.auditing.workers import _end_with
parent, child = os.getpid(), os.fork()
if child:
    print(child, flush=True)
    os.kill(parent, signal.SIGKILL)
_end_with(parent)
"""


def test_a_worker_ends_with_an_audit_that_is_killed():
    said = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ORPHAN], capture_output=True, text=True, check=False
    )  # which ends when the child has ended too, for that holds the other end of the pipe
    assert said.returncode == -signal.SIGKILL
    with suppress(psutil.NoSuchProcess):
        psutil.Process(int(said.stdout)).wait(timeout=60)  # raises if it lives on


def test_workers_end_where_the_audit_is_interrupted_while_they_start(monkeypatch):
    """Their executor has a thread that ends them; for a moment it is there, but not started."""
    executor = get_reusable_executor(max_workers=2)
    executor.submit(time.sleep, 0).result()
    assert len(alive(os.getpid(), "LokyProcess")) == 2

    class Starting:
        def shutdown(self, **how: bool) -> None:
            Thread().join()

    with monkeypatch.context() as patched:
        patched.setattr(workers, "get_reusable_executor", lambda reuse: Starting())
        workers._end_processes()
    assert not alive(os.getpid(), "LokyProcess")
    workers._end_processes()  # the real one, which has lost its processes, ends as well


def test_workers_that_keep_dying_are_given_up(shelf, tmp_path, monkeypatch):
    spec = AuditSpec.model_validate(shelf.audit("lora", **{**SMALL, **LINE}))
    monkeypatch.setattr(workers, "RETRIES", 0)
    threads = torch.get_num_threads()

    def kill() -> None:
        for process in alive(os.getpid(), "LokyProcess")[:1]:
            process.kill()

    with (
        Ledger(tmp_path) as ledger,
        Workers(spec, 2, threads=1) as crew,
        pytest.raises(UserError, match=r"workers died 1 times in a row .*; use fewer workers and"),
    ):
        audit(spec, Progress(lambda text: None, kill), ledger, crew)
    assert not alive(os.getpid(), "LokyProcess")
    assert torch.get_num_threads() == threads
    assert recorded(tmp_path)


def test_without_ray_its_backend_is_refused(shelf, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    spec = AuditSpec.model_validate(shelf.audit("lora", **SMALL))
    with pytest.raises(UserError, match=r"not installed; pip install 'trap2\[ray\]'"):
        Workers(spec, 2, "ray").__enter__()


def test_a_ray_worker_killed_changes_nothing(shelf, tmp_path):
    """A cluster of two workers on this machine; one is killed while it works."""
    ray = pytest.importorskip("ray", reason="ray is not installed; pip install 'trap2[ray]'")
    spec = AuditSpec.model_validate(shelf.audit("lora", **{**SMALL, **LINE}))
    killed = []

    def kill() -> None:
        if not killed:
            killed.append(alive(os.getpid(), "ray::PoolActor")[0])
            killed[0].kill()

    with pytest.raises(UserError, match="99 workers need a core each, the Ray cluster has"):
        Workers(spec, 99, "ray").__enter__()
    with Ledger(tmp_path) as ledger, Workers(spec, 2, "ray", threads=1) as crew:
        report = audit(spec, Progress(lambda text: None, kill), ledger, crew)
    assert len(killed) == 1
    assert not ray.is_initialized()
    assert same(report, audit(spec))
