"""Evaluations by several processes: on this machine, or on a Ray cluster.

Every worker opens the audit for itself, once, and has a live model of its own. Weights are read
from memory-mapped files, of which a machine's workers share what its system holds. Logits come back
as they are ready; only the caller writes them down. If a worker dies, all are started anew and do
what is not done yet.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from importlib import import_module
from multiprocessing import active_children
from threading import Thread
from types import TracebackType
from typing import Any, Literal

import torch
from joblib import Parallel, cpu_count, delayed
from joblib.externals.loky import get_reusable_executor
from joblib.externals.loky.backend.process import LokyProcess
from pydantic import ValidationError

from trap2.attacks.attack import load_attacks
from trap2.auditing.arena import Arena, Done, Job, Mixture
from trap2.errors import UserError
from trap2.recipes import AuditSpec

RETRIES = 3
"""Times in a row that workers may die before a single job is done."""


class Workers:
    """Processes that do jobs of one audit, for as long as the `with` block lasts.

    Inside the block this process computes on as many threads as each of them: how many there are
    decides the last bits.

    Args:
        spec: The audit.
        count: How many processes.
        backend: "loky" for this machine, "ray" for a cluster.
        address: Of the cluster; without one, Ray is started on this machine.
        threads: Of each process; by default an equal share of the cores.

    Raises:
        UserError: Ray is not installed, not reachable or too small, or a task's function is defined
            where workers cannot find it.
    """

    def __init__(
        self,
        spec: AuditSpec,
        count: int,
        backend: Literal["loky", "ray"] = "loky",
        address: str | None = None,
        threads: int | None = None,
    ) -> None:
        for task in (spec.release.task, *(partner.task for partner in spec.partners)):
            if task.function is not None:
                _refuse_script(task.function, f"the function of task '{task.name}'")
        self.count, self._spec, self._backend = count, spec.model_dump_json(), backend
        self._address, self._threads = address, threads or 0

    def __enter__(self) -> "Workers":
        with ExitStack() as closing:
            if self._backend == "ray":
                cores = closing.enter_context(_cluster(self._address, self.count))
            else:
                cores = cpu_count()
                closing.callback(_end_processes)
            self._threads = self._threads or max(1, cores // self.count)
            closing.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(self._threads)
            self._pool = self._started()
            closing.callback(lambda: self._pool.__exit__(None, None, None))
            self._closing = closing.pop_all()
        return self

    def _started(self) -> Any:
        """The processes, which stay from call to call."""
        backend = "loky" if self._backend == "loky" else _ray_backend(self._threads)
        unordered = "generator_unordered"
        return Parallel(n_jobs=self.count, backend=backend, return_as=unordered).__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.close()

    def __call__(self, jobs: Sequence[Job]) -> Iterator[tuple[Mixture, Done]]:
        """Do jobs, in any order, each until it is done.

        Yields:
            A job's mixture, with everything that is read off it.

        Raises:
            UserError: Workers keep dying, or an attack is defined where they cannot find it.
        """
        homes = {mixture.attack: _home(mixture.attack) for mixture, _ in jobs}
        left, deaths = dict(jobs), 0
        while left:
            calls = [
                delayed(_work)(self._spec, os.getpid(), self._threads, homes[job[0].attack], job)
                for job in left.items()
            ]
            try:
                for mixture, done in self._pool(calls):
                    deaths = 0
                    del left[mixture]
                    yield mixture, done
            except _deaths(self._backend) as error:
                deaths += 1
                if deaths > RETRIES:
                    raise UserError(
                        f"workers died {deaths} times in a row without finishing any of "
                        f"{len(left)} jobs, perhaps for lack of memory; use fewer workers and run "
                        "it again: what was recorded is kept"
                    ) from error
                # A new one, because joblib's old one would go on with calls it has not begun yet.
                self._pool.__exit__(None, None, None)
                self._pool = self._started()


def _work(spec: str, auditing: int, threads: int, home: str, job: Job) -> tuple[Mixture, Done]:
    """Do one job in a worker of the process `auditing`."""
    torch.set_num_threads(threads)
    try:
        import_module(home)
        arena, (mixture, readings) = _arena(spec, auditing), job
    except (ImportError, ValidationError) as error:
        # The second of them cannot even be sent back.
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"a worker cannot open this audit: {reason}; what an attack or a task's function needs "
            "must be on the Python path of every worker"
        ) from None
    return mixture, [
        (reading, arena.contents.of(mixture, *reading).key, found.outputs)
        for reading, found in arena.run(mixture, readings)
    ]


@lru_cache(maxsize=1)
def _arena(spec: str, auditing: int) -> Arena:
    """The worker's own, made once."""
    if os.getppid() == auditing:  # on Ray it is not, and Ray itself ends what is left
        Thread(target=_end_with, args=(auditing,), daemon=True).start()
    return Arena(AuditSpec.model_validate_json(spec))


def _end_with(parent: int) -> None:
    """End this process with its parent, which may be killed before it can say so."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _home(attack: str) -> str:
    """The module that registers an attack when it is imported."""
    return _refuse_script(load_attacks().get(attack).function, f"attack '{attack}'")


def _refuse_script(function: Callable[..., Any], what: str) -> str:
    """The module that defines a function, if workers can import it."""
    if function.__module__ == "__main__":
        raise UserError(
            f"{what} is defined in the script that is run, where workers do not find it; define it "
            "in a module of its own, or do without workers"
        )
    return function.__module__


def _end_processes() -> None:
    try:
        get_reusable_executor(reuse=True).shutdown(wait=True, kill_workers=True)
    except RuntimeError:  # interrupted while they were started: nobody is there yet to end them
        for process in active_children():
            if isinstance(process, LokyProcess):
                process.terminate()
                process.join()


def _deaths(backend: str) -> tuple[type[Exception], ...]:
    """What is raised when a worker has died."""
    if backend == "loky":
        return (BrokenExecutor,)
    from ray.exceptions import RayActorError

    return (RayActorError,)


@contextmanager
def _cluster(address: str | None, count: int) -> Iterator[int]:
    """Ray for the length of the block, or as long as it has been there; yields its cores."""
    try:
        import ray
    except ModuleNotFoundError as error:
        raise UserError(
            "backend 'ray' needs Ray, which is not installed; pip install 'trap2[ray]'"
        ) from error
    started = not ray.is_initialized()
    if started:
        try:
            ray.init(address or "local", include_dashboard=False, log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"no Ray cluster at '{address}': {reason}; check the address and that it runs"
            ) from error
    try:
        cores = int(ray.cluster_resources().get("CPU", 0))
        if cores < count:
            raise UserError(
                f"{count} workers need a core each, the Ray cluster has {cores}; use fewer workers"
            )
        yield cores
    finally:
        if started:
            ray.shutdown()


def _ray_backend(threads: int) -> Any:
    """The Ray backend of joblib, one actor a worker with so many cores."""
    from ray.util.joblib.ray_backend import RayBackend

    class Streaming(RayBackend):  # type: ignore[misc, unused-ignore]
        """Gives results as they come, which its base can and does not say."""

        supports_return_generator = True

    return Streaming(ray_remote_args={"num_cpus": threads})
