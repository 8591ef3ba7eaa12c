"""SQLite files of a run: opened, read and written so that a damaged file or a full disk is one message."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from fedsim.errors import DataError, StorageError

# What SQLite says of the disk rather than of the file: https://www.sqlite.org/rescode.html
DISK = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY}


def open_database(path: Path | None, schema: str, what: str) -> sqlite3.Connection:
    """Open for writing, with a write-ahead log: a killed process loses nothing that was committed.

    Args:
        path: None: in memory.
        what: the file's contents, for messages.

    Raises:
        DataError: the file is damaged or no such database.
        StorageError: the disk is full or read-only.
    """
    try:
        db = sqlite3.connect(path if path else ":memory:", isolation_level=None)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        db.executescript(schema)
        return db
    except sqlite3.Error as error:
        raise _explain(path, what, error) from None


def open_reader(path: Path, what: str) -> sqlite3.Connection:
    """Open for reading, on a read-only disk too; a writer beside it is not disturbed.

    Raises:
        DataError: the file is missing, damaged or no such database.
    """
    if not path.is_file():
        raise DataError(f"{path}: no {what} there; expected the {path.name} of a run directory")
    # Readers share a log with the writer in files beside the database; where none can be made, nobody writes.
    alone = "" if os.access(path.parent, os.W_OK) else "&immutable=1"
    try:
        db = sqlite3.connect(f"file:{quote(str(path.resolve()))}?mode=ro{alone}", uri=True, isolation_level=None)
        db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
        return db
    except sqlite3.Error as error:
        raise _explain(path, what, error) from None


@contextlib.contextmanager
def transaction(db: sqlite3.Connection, path: Path | None) -> Iterator[None]:
    """All of the block's statements or none.

    Raises:
        StorageError: they cannot be written.
        DataError: the file is damaged.
    """
    try:
        db.execute("BEGIN IMMEDIATE")
        yield
        db.execute("COMMIT")
    except sqlite3.Error as error:
        with contextlib.suppress(sqlite3.Error):
            db.execute("ROLLBACK")
        raise _explain(path, "database", error) from None
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            db.execute("ROLLBACK")
        raise


@contextlib.contextmanager
def reading(path: Path | None, what: str) -> Iterator[None]:
    """Name the file if what is read from it is damaged.

    Raises:
        DataError: it is.
    """
    try:
        yield
    except sqlite3.Error as error:
        raise _explain(path, what, error) from None


def _explain(path: Path | None, what: str, error: sqlite3.Error) -> DataError | StorageError:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the low byte is the primary code
    if code in DISK:
        return StorageError(path, error)
    return DataError(f"{path}: not the {what} of a run ({error}); move the file away, or take a whole copy of the run")
