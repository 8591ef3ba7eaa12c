"""Metrics of a run: (sum, weight) records in one SQLite file, so that any mean can be formed later."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from pathlib import Path

from fedsim.errors import DataError

Row = tuple[int, int, str, str, str, float, float]  # round, client, domain, split, name, sum, weight

SCHEMA = """
CREATE TABLE IF NOT EXISTS names (id INTEGER PRIMARY KEY, name TEXT UNIQUE);
CREATE TABLE IF NOT EXISTS records (
    name INTEGER, round INTEGER, split INTEGER, domain INTEGER, client INTEGER, sum REAL, weight REAL
);
CREATE INDEX IF NOT EXISTS by_name ON records (name, split, round);
"""


class MetricStore:
    """Records by round, client (-1: the federation), domain ('': none), split and name; value = sum / weight.

    Rows are buffered until ``commit``; a reader in another process sees whole rounds.

    Raises:
        DataError: the file is damaged or no database.
    """

    def __init__(self, path: Path, *, create: bool = True):
        if not create and not path.exists():
            raise DataError(f"{path}: no metrics there; expected the metrics.sqlite of a run directory")
        self.path = path
        self._rows: list[Row] = []
        self._ids: dict[str, int] = {}
        try:
            self.db = sqlite3.connect(path, isolation_level=None)
            self.db.execute("PRAGMA journal_mode = WAL")
            self.db.execute("PRAGMA synchronous = NORMAL")
            self.db.executescript(SCHEMA)
            self._ids = {name: number for number, name in self.db.execute("SELECT * FROM names")}
        except sqlite3.Error as error:
            raise DataError(f"{path}: not a metrics database of a run ({error})") from None

    def _id(self, name: str) -> int:
        if name not in self._ids:
            self._ids[name] = self.db.execute("INSERT INTO names (name) VALUES (?)", (name,)).lastrowid or 0
        return self._ids[name]

    def add(self, rows: Iterable[Row]) -> None:
        self._rows += rows

    def commit(self) -> None:
        """Write the buffered rows in one transaction."""
        if not self._rows:
            return
        self.db.execute("BEGIN")
        coded = [
            (self._id(name), round, self._id(split), self._id(domain), client, total, weight)
            for round, client, domain, split, name, total, weight in self._rows
        ]
        self.db.executemany("INSERT INTO records VALUES (?, ?, ?, ?, ?, ?, ?)", coded)
        self.db.execute("COMMIT")
        self._rows.clear()

    def rewind(self, round: int) -> None:
        """Forget everything later than ``round``, buffered or written."""
        self._rows = [row for row in self._rows if row[0] <= round]
        self.db.execute("DELETE FROM records WHERE round > ?", (round,))

    def read(self, name: str, split: str = "") -> list[tuple[int, int, str, float, float]]:
        """(round, client, domain, sum, weight) of a metric, by round and client."""
        return self.db.execute(
            "SELECT r.round, r.client, d.name, r.sum, r.weight FROM records r JOIN names d ON d.id = r.domain"
            " WHERE r.name = (SELECT id FROM names WHERE name = ?) AND r.split = (SELECT id FROM names WHERE name = ?)"
            " ORDER BY r.round, r.client, r.rowid",
            (name, split),
        ).fetchall()

    def by_domain(self, name: str, split: str = "test") -> dict[str, list[tuple[int, float]]]:
        """domain -> [(round, mean over the domain's models of sum / weight)]."""
        rows = self.db.execute(
            "SELECT d.name, r.round, AVG(r.sum / r.weight) FROM records r JOIN names d ON d.id = r.domain"
            " WHERE r.name = (SELECT id FROM names WHERE name = ?) AND r.split = (SELECT id FROM names WHERE name = ?)"
            " AND r.weight > 0 GROUP BY r.domain, r.round ORDER BY r.round",
            (name, split),
        ).fetchall()
        curves: dict[str, list[tuple[int, float]]] = {}
        for domain, round, value in rows:
            curves.setdefault(domain, []).append((round, value))
        return curves

    def close(self) -> None:
        self.db.close()
