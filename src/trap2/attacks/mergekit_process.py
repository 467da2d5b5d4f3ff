"""mergekit in a process of its own: found, asked for its version, and given merges to make.

Its interpreter is named by the environment variable TRAP2_MERGEKIT and is by default the one that
runs this. mergekit is never imported here: it is under the LGPL, and its requirements may differ.
"""

import atexit
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Timer

from trap2.errors import Trap2Error, UserError

VARIABLE = "TRAP2_MERGEKIT"
WORKER = Path(__file__).with_name("mergekit_worker.py")
LIMIT = 3600
"""Seconds until a merge without an answer is given up."""

ASK = "from importlib.metadata import version; print(version('mergekit'))"


def interpreter() -> str:
    """The interpreter that has mergekit."""
    return os.environ.get(VARIABLE) or sys.executable


def installed_version() -> str:
    """The version of mergekit there.

    Raises:
        UserError: It is not installed there, or there is no such interpreter.
    """
    return _version(interpreter())


@cache
def _version(python: str) -> str:
    try:
        asked = [python, "-c", ASK]
        done = subprocess.run(asked, capture_output=True, text=True, check=False)  # noqa: S603
    except OSError as error:
        raise UserError(
            f"{VARIABLE}={python} cannot be run: {error.strerror}; set it to the Python "
            "interpreter of an environment with mergekit"
        ) from error
    if done.returncode:
        raise UserError(
            f"{python} has no mergekit; pip install mergekit into an environment and set "
            f"{VARIABLE} to its Python interpreter, or leave the attacks 'mergekit_...' out"
        )
    return done.stdout.strip()


class Mergekit:
    """A process that makes merges, begun with the first one and ended with this process.

    Args:
        python: Its interpreter.
    """

    def __init__(self, python: str) -> None:
        self._python = python
        self._home = TemporaryDirectory(prefix="trap2-mergekit-")
        self.folder = Path(self._home.name)  # the process's own: names are from here
        self._process: subprocess.Popen[str] | None = None

    def merge(self, configuration: str, out: Path, seed: int) -> None:
        """Make one merge.

        Args:
            configuration: mergekit's YAML.
            out: Folder that will hold the merged weights.
            seed: Of its draws.

        Raises:
            Trap2Error: mergekit ended with an error.
        """
        path = out.with_suffix(".yaml")
        path.write_text(configuration, encoding="utf-8")
        process = self._running()
        timer = Timer(LIMIT, process.kill)
        timer.start()
        done = ""
        try:
            done = _answer(process, [str(path), str(out), "--random-seed", str(seed)])
        finally:
            late = not timer.is_alive()
            timer.cancel()
            if not done:  # so that no answer to this merge is ever taken for one to the next
                self.end()
        if not done:
            reason = f"no answer within {LIMIT} s" if late else self._reason()
            raise Trap2Error(
                f"mergekit in {self._python} ended with '{reason}'; try the same merge by hand, or "
                "leave the attack out"
            )

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            own = {name: v for name, v in os.environ.items() if not name.startswith("PYTHON")}
            with (self.folder / "log").open("w") as log:
                self._process = subprocess.Popen(  # noqa: S603
                    [self._python, str(WORKER)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    cwd=self.folder,
                    env={**own, "PYTHONHASHSEED": "0"},  # the order of tensors, and so of draws
                )
        return self._process

    def _reason(self) -> str:
        log = (self.folder / "log").read_text(encoding="utf-8", errors="replace")
        lines = [line.strip() for line in log.splitlines() if line.strip()]
        return lines[-1] if lines else "no message"

    def end(self) -> None:
        """End the process; the next merge begins another."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def close(self) -> None:
        """End the process and remove its folder."""
        self.end()
        self._home.cleanup()


def _answer(process: "subprocess.Popen[str]", arguments: list[str]) -> str:
    """What it says when it has done one merge; nothing if it ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(arguments) + "\n")
        process.stdin.flush()
        return process.stdout.readline()
    except BrokenPipeError:
        return ""


@cache
def mergekit(python: str) -> Mergekit:
    """The process of an interpreter."""
    made = Mergekit(python)
    atexit.register(made.close)
    return made
