"""The run directory: one process writes it, everything in it is appended to or replaced atomically."""

from __future__ import annotations

import fcntl
import json
import time
from pathlib import Path
from typing import Any

from fedsim.checkpoint import write_atomically
from fedsim.config import Config, to_toml
from fedsim.errors import DataError


class RunWriter:
    """Creates or reopens a run directory and holds its lock.

    Raises:
        DataError: it cannot be made, another process is writing it, or a new run would overwrite an old one.
    """

    def __init__(self, path: Path, *, resume: bool = False):
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / "plots").mkdir(exist_ok=True)
            self._lock = open(path / "run.lock", "a")  # noqa: SIM115 (held until the process ends)
        except OSError as error:
            raise DataError(f"{path}: cannot be used as a run directory: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(f"{path}: another process is writing this run directory; wait for it or stop it") from None
        if not resume and (path / "config.toml").exists():
            raise DataError(
                f"{path}: holds a run already; continue it with 'fedsim resume {path}' or choose another --out"
            )

    def write_config(self, config: Config) -> None:
        write_atomically(self.path / "config.toml", to_toml(config).encode())

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_atomically(self.path / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())

    def event(self, what: str, **details: Any) -> None:
        """Append one line to events.jsonl."""
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S"), "event": what, **details}
        with open(self.path / "events.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        self._lock.close()
