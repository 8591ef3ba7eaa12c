"""Private state of the clients between rounds: FedBN's normalization, a client's own rate, whatever a plug-in keeps.

Rows are versioned by round, so that a run resumed at round t sees exactly what its clients kept in round t, however
far the killed run had got. States of recent clients are in memory; all are in one SQLite file, as checksummed
safetensors. A client without a row was never trained: it starts from the initial private tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from fedsim.database import open_database, reading, transaction
from fedsim.errors import DataError
from fedsim.packing import Packed


class ClientStore:
    """Args:
    path: the file, or None for a store that lives and dies with this process.
    budget: bytes of the states in memory, of those kept and of those staged.
    """

    def __init__(self, path: Path | None = None, budget: int = 1 << 30):
        self.path = path
        self.db = open_database(
            path,
            "CREATE TABLE IF NOT EXISTS states (client INTEGER, round INTEGER, sha256 BLOB, data BLOB,"
            " PRIMARY KEY (client, round));"
            "CREATE TABLE IF NOT EXISTS staged (client INTEGER PRIMARY KEY, round INTEGER, sha256 BLOB, data BLOB);"
            "DELETE FROM staged",
            "private states",
        )
        self.budget = budget
        self.recent: dict[int, tuple[int, Packed]] = {}
        self.dirty: set[int] = set()
        self.bytes = 0
        self.staged: dict[int, tuple[int, Packed]] = {}
        self.staged_bytes, self.spilled = 0, False
        with reading(path, "private states"):
            # Clients that may have several versions, and the newest's round.
            self.versions: dict[int, int] = dict(
                self.db.execute("SELECT client, MAX(round) FROM states GROUP BY client HAVING COUNT(*) > 1")
            )
            self.empty = self.db.execute("SELECT 1 FROM states LIMIT 1").fetchone() is None

    def get(self, client: int) -> Packed | None:
        """The newest state of a client, or None if it was never trained.

        Raises:
            DataError: the stored bytes are damaged.
        """
        if self.empty:
            return None
        if client in self.recent:
            return self.recent[client][1]
        row = self.db.execute(
            "SELECT data, sha256, round FROM states WHERE client = ? ORDER BY round DESC LIMIT 1", (client,)
        ).fetchone()
        if row is None:
            return None
        data, digest, round = row
        if hashlib.sha256(data).digest() != digest:
            raise DataError(
                f"{self.path}: the private state of client {client} of round {round} is damaged (its checksum differs);"
                f" resume --round with a checkpoint before round {round}, or start the run anew"
            )
        return Packed.from_bytes(data)

    def stage(self, client: int, round: int, state: Packed) -> None:
        """Take a new state that ``get`` does not see before ``accept``; many of them wait on disk."""
        if state.layout.empty:
            return
        # A copy: what comes from a worker is part of a larger message, which would stay in memory with it.
        self.staged[client] = (round, state.copy())
        self.staged_bytes += state.layout.size
        if self.staged_bytes > self.budget:
            with transaction(self.db, self.path):
                self.db.executemany("INSERT OR REPLACE INTO staged VALUES (?, ?, ?, ?)", _rows(self.staged))
            self.staged, self.staged_bytes, self.spilled = {}, 0, True

    def accept(self) -> None:
        """Make what was staged the newest states."""
        if self.spilled:
            with transaction(self.db, self.path):
                self.db.execute("INSERT OR REPLACE INTO states SELECT client, round, sha256, data FROM staged")
            for client, round in self.db.execute("SELECT client, round FROM staged").fetchall():
                self.bytes -= self.recent.pop(client)[1].layout.size if client in self.recent else 0
                self.dirty.discard(client)
                self.versions[client] = round
            self.empty = False
        staged = self.staged
        self.discard()
        for client, (round, state) in staged.items():
            self.put(client, round, state)

    def discard(self) -> None:
        """Forget what was staged."""
        if self.spilled:
            with transaction(self.db, self.path):
                self.db.execute("DELETE FROM staged")
        self.staged, self.staged_bytes, self.spilled = {}, 0, False

    def put(self, client: int, round: int, state: Packed) -> None:
        if state.layout.empty:
            return
        self.bytes += state.layout.size - (self.recent[client][1].layout.size if client in self.recent else 0)
        self.recent[client] = (round, state)
        self.empty = False
        self.dirty.add(client)
        if self.bytes > self.budget:
            self.flush()
            self.recent.clear()
            self.bytes = 0

    def flush(self) -> None:
        """Write what changed since the last call; after it a resume at this round finds every state.

        Raises:
            StorageError: the disk is full, say; nothing of it is written.
        """
        if not self.dirty:
            return
        with transaction(self.db, self.path):
            changed = {client: self.recent[client] for client in sorted(self.dirty)}
            self.db.executemany("INSERT OR REPLACE INTO states VALUES (?, ?, ?, ?)", _rows(changed))
        self.versions |= {client: round for client, (round, _) in changed.items()}
        self.dirty.clear()

    def rewind(self, round: int) -> None:
        """Forget everything later than ``round``."""
        self.recent.clear()
        self.dirty.clear()
        self.bytes = 0
        with transaction(self.db, self.path):
            self.db.execute("DELETE FROM states WHERE round > ?", (round,))

    def prune(self, round: int) -> None:
        """Drop versions that no resume at ``round`` or later can ask for."""
        with transaction(self.db, self.path):
            self.db.executemany(
                "DELETE FROM states WHERE client = :client AND round < (SELECT MAX(round) FROM states"
                " WHERE client = :client AND round <= :round)",
                ({"client": client, "round": round} for client in sorted(self.versions)),
            )
        self.versions = {client: newest for client, newest in self.versions.items() if newest > round}

    def close(self) -> None:
        self.db.close()


def _rows(states: Mapping[int, tuple[int, Packed]]) -> Iterator[tuple[int, int, bytes, bytes]]:
    for client, (round, state) in states.items():
        data = state.to_bytes()
        yield client, round, hashlib.sha256(data).digest(), data
