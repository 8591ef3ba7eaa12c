"""The run directory: one process writes it, everything in it is appended to or replaced atomically."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
import time
from pathlib import Path
from typing import Any

from fedsim.checkpoint import write_atomically
from fedsim.config import Config, to_toml
from fedsim.errors import DataError, StorageError


class RunWriter:
    """Creates or reopens a run directory and holds its lock.

    Raises:
        DataError: it cannot be made, another process is writing it, or a new run would overwrite an old one.
    """

    def __init__(self, path: Path, *, resume: bool = False):
        self.path = path
        if not resume:
            self._refuse_old()
        self._new = not path.exists()
        self._before = set() if self._new or not path.is_dir() else set(path.iterdir())
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / "plots").mkdir(exist_ok=True)
            self._lock = open(path / "run.lock", "a")  # noqa: SIM115 (held until the process ends)
            with open(path / "events.jsonl", "a"):
                pass
        except OSError as error:
            if not resume:
                self._remove()
            what = f"{error.filename or path}: {error.strerror}"
            mend = "make it writable" if resume else "choose another --out"
            raise DataError(f"{path}: cannot be used as a run directory ({what}); {mend}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(f"{path}: another process is writing this run directory; wait for it or stop it") from None
        if not resume:
            self._refuse_old()  # of a process that had the lock a moment ago

    def _refuse_old(self) -> None:
        if (self.path / "config.toml").exists():
            raise DataError(
                f"{self.path}: holds a run already; continue it with 'fedsim resume {self.path}' or choose another"
                " --out"
            )

    def write_config(self, config: Config) -> None:
        write_atomically(self.path / "config.toml", to_toml(config).encode())

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_atomically(self.path / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())

    def event(self, what: str, **details: Any) -> None:
        """Append one line to events.jsonl.

        Raises:
            StorageError: the disk is full, say.
        """
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S"), "event": what, **details}
        path = self.path / "events.jsonl"
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise StorageError(path, error.strerror) from None

    def discard(self) -> None:
        """Take back a new run that could not begin: whatever was not there before it."""
        self.close()
        self._remove()

    def _remove(self) -> None:
        for path in [self.path] if self._new else set(self.path.glob("*")) - self._before:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            with contextlib.suppress(OSError):
                path.unlink()

    def close(self) -> None:
        self._lock.close()
