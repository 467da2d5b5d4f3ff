"""The record of every evaluation an audit has made, so that a killed audit goes on where it was.

One SQLite file, because its transactions already do what is hard: a row is there as a whole or not
at all whenever the process dies, several audits may write at the same time, and a row is found by
its key without reading the rest. Its rollback journal also works on network file systems, which
its write-ahead log does not.

Rows are keyed by content (`contents.py`), not by audit: one ledger may serve several audits, and a
row whose inputs have changed is never found again. Rows are only ever added.
"""

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from trap2.auditing.contents import Content
from trap2.errors import UserError
from trap2.files import LEDGER

PATIENCE = 60.0
"""Seconds to wait for another process that is writing a row."""

TABLE = """
CREATE TABLE IF NOT EXISTS evaluations (
    key TEXT PRIMARY KEY,      -- SHA-256 of the content
    content TEXT NOT NULL,     -- JSON: attack, parameters, coefficients, digests of all inputs
    places TEXT NOT NULL,      -- JSON: digest by the place the input was read from
    logits BLOB NOT NULL       -- float32, row by row
)
"""


class Ledger:
    """Logits by what they were computed from.

    Args:
        folder: Where its file is, or will be from the first evaluation on.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LEDGER
        self._database: sqlite3.Connection | None = None

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

    def get(self, content: Content, rows: int) -> Tensor | None:
        """The logits (rows, C) recorded for this content, bit for bit; None if there are none.

        Raises:
            UserError: The file is damaged or cannot be read.
        """
        if not self.path.is_file():
            return None
        with self._open() as database:
            found = database.execute(
                "SELECT logits FROM evaluations WHERE key = ?", (content.key,)
            ).fetchone()
        if found is None:
            return None
        logits = torch.frombuffer(bytearray(found[0]), dtype=torch.float32)
        return logits.reshape(rows, -1)

    def put(self, content: Content, logits: Tensor) -> None:
        """Add the logits (N, C) float32 of one evaluation; on the disk when this returns.

        Raises:
            UserError: The disk is full or the place is not writable; earlier rows are kept.
        """
        row = (content.key, content.text, json.dumps(content.places), logits.numpy().tobytes())
        with self._open() as database:
            database.execute("INSERT OR IGNORE INTO evaluations VALUES (?, ?, ?, ?)", row)

    def outdated(self, places: Mapping[str, str]) -> Iterator[str]:
        """Which inputs are known only with other contents, and how many rows that makes useless.

        Args:
            places: The digest of every input of an audit, by the place it is read from.

        Yields:
            One sentence for each changed input.

        Raises:
            UserError: The file is damaged or cannot be read.
        """
        if not self.path.is_file():
            return
        with self._open() as database:
            recorded = database.execute("SELECT places FROM evaluations").fetchall()
        mine = [row for row in (json.loads(text) for (text,) in recorded) if {*row} <= {*places}]
        for place, digest in places.items():
            known = [row[place] for row in mine if place in row]
            if known and digest not in known:
                yield (
                    f"{place} changed since: {len(known)} of {len(mine)} recorded evaluations "
                    "no longer apply"
                )

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """The database, made if need be; what goes wrong with it in one line."""
        try:
            if self._database is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                # No transaction but a statement's own: each row is one.
                self._database = sqlite3.connect(self.path, timeout=PATIENCE, isolation_level=None)
                self._database.execute(TABLE)
            yield self._database
        except (sqlite3.OperationalError, OSError) as error:
            raise UserError(
                f"cannot use {self.path}: {_reason(error)}; free space or choose another place, "
                "then run it again: what was recorded is kept"
            ) from error
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"{self.path} is damaged: {error}; delete it, its evaluations will be made again"
            ) from error


def _reason(error: Exception) -> Any:
    return getattr(error, "strerror", None) or error
