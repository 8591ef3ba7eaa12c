"""Metrics of a run: (sum, weight) records in one SQLite file, so that any mean can be formed later."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedsim.database import open_database, open_reader, reading, transaction

Row = tuple[int, int, str, str, str, float, float]  # round, client, domain, split, name, sum, weight

WHAT = "metrics"
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

    Args:
        create: False: for reading alone; the file must be there.

    Raises:
        DataError: the file is damaged or no database.
        StorageError: the disk is full or read-only.
    """

    def __init__(self, path: Path, *, create: bool = True):
        self.path = path
        self._rows: list[Row] = []
        self.db = open_database(path, SCHEMA, WHAT) if create else open_reader(path, WHAT)
        with reading(path, WHAT):
            self._ids: dict[str, int] = {name: number for number, name in self.db.execute("SELECT * FROM names")}
            self.db.execute("SELECT name, round, split, domain, client, sum, weight FROM records LIMIT 1").fetchone()

    def _id(self, name: str) -> int:
        if name not in self._ids:
            self._ids[name] = self.db.execute("INSERT INTO names (name) VALUES (?)", (name,)).lastrowid or 0
        return self._ids[name]

    def add(self, rows: Iterable[Row]) -> None:
        self._rows += rows

    def commit(self) -> None:
        """Write the buffered rows in one transaction.

        Raises:
            StorageError: the disk is full, say; nothing of it is written.
        """
        if not self._rows:
            return
        known = dict(self._ids)
        try:
            with transaction(self.db, self.path):
                coded = [
                    (self._id(name), round, self._id(split), self._id(domain), client, total, weight)
                    for round, client, domain, split, name, total, weight in self._rows
                ]
                self.db.executemany("INSERT INTO records VALUES (?, ?, ?, ?, ?, ?, ?)", coded)
        except BaseException:
            self._ids = known  # names made in a transaction that was rolled back do not exist
            raise
        self._rows.clear()

    def rewind(self, round: int) -> None:
        """Forget everything later than ``round``, buffered or written."""
        self._rows = [row for row in self._rows if row[0] <= round]
        with transaction(self.db, self.path):
            self.db.execute("DELETE FROM records WHERE round > ?", (round,))

    def read(self, name: str, split: str = "") -> list[tuple[int, int, str, float, float]]:
        """(round, client, domain, sum, weight) of a metric, by round and client; NaN as it was recorded."""
        rows = self._fetch(
            "SELECT r.round, r.client, d.name, r.sum, r.weight FROM records r JOIN names d ON d.id = r.domain"
            " WHERE r.name = (SELECT id FROM names WHERE name = ?) AND r.split = (SELECT id FROM names WHERE name = ?)"
            " ORDER BY r.round, r.client, r.rowid",
            (name, split),
        )
        return [(*where, _number(total), _number(weight)) for *where, total, weight in rows]

    def _fetch(self, query: str, values: tuple[str, str]) -> list[Any]:
        with reading(self.path, WHAT):
            return self.db.execute(query, values).fetchall()

    def by_domain(self, name: str, split: str = "test") -> dict[str, list[tuple[int, float]]]:
        """domain -> [(round, mean over the domain's models of sum / weight)]; NaN if one of them is."""
        rows = self._fetch(
            # SQLite keeps NaN as NULL, and AVG passes over it: a model that diverged would be left out in silence.
            "SELECT d.name, r.round, CASE WHEN COUNT(r.sum) = COUNT(*) THEN AVG(r.sum / r.weight) END"
            " FROM records r JOIN names d ON d.id = r.domain"
            " WHERE r.name = (SELECT id FROM names WHERE name = ?) AND r.split = (SELECT id FROM names WHERE name = ?)"
            " AND r.weight > 0 GROUP BY r.domain, r.round ORDER BY r.round",
            (name, split),
        )
        curves: dict[str, list[tuple[int, float]]] = {}
        for domain, round, value in rows:
            curves.setdefault(domain, []).append((round, _number(value)))
        return curves

    def close(self) -> None:
        self.db.close()


def _number(value: float | None) -> float:
    return math.nan if value is None else value
