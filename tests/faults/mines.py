"""A run that kills itself with SIGKILL at the n-th thing it does to its files between aggregating and checkpointing."""

from __future__ import annotations

import builtins
import os
import signal
import sqlite3
from pathlib import Path
from typing import Any

import fedsim.checkpoint
import fedsim.run
from fedsim.config import load_config


class Mine:
    """Counts the points passed while it is armed; at number ``fatal`` the process is gone.

    Args:
        fatal: 0: none; the points are written down instead.
        round: the round after whose aggregation it is armed.
    """

    def __init__(self, fatal: int, round: int, log: Path):
        self.fatal, self.round, self.log = fatal, round, log
        self.armed, self.passed = False, 0

    def step(self, point: str) -> None:
        if not self.armed:
            return
        self.passed += 1
        if not self.fatal:
            with builtins.open(self.log, "a") as file:
                file.write(f"{point}\n")
        if self.passed == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, owner: Any, name: str) -> None:
        """A point before and one after every call."""
        original = getattr(owner, name)

        def mined(*inputs: Any, **options: Any) -> Any:
            self.step(f"before {name}")
            result = original(*inputs, **options)
            self.step(f"after {name}")
            return result

        setattr(owner, name, mined)

    def lay(self) -> None:
        """Into this process, which is the test's own: files, databases, and the round loop that arms it."""
        for name in ("fsync", "replace", "unlink"):
            self.around(os, name)
        self.around(Path, "unlink")
        mine, connect = self, sqlite3.connect
        run_round, checkpoint = fedsim.run._Run._round, fedsim.run._Run._checkpoint

        class Connection(sqlite3.Connection):
            def execute(self, statement: str, *inputs: Any) -> sqlite3.Cursor:
                verb = statement.split()[0]
                mine.step(f"before {verb}")
                cursor = super().execute(statement, *inputs)
                mine.step(f"after {verb}")
                return cursor

        class Halves:
            """A file of which half is there, and then the rest."""

            def __init__(self, file: Any):
                self.file = file

            def __enter__(self) -> Any:
                return self

            def __exit__(self, *error: object) -> None:
                self.file.close()

            def __getattr__(self, name: str) -> Any:
                return getattr(self.file, name)

            def write(self, data: bytes) -> None:
                self.file.write(data[: len(data) // 2])
                self.file.flush()
                mine.step("half of a file")
                self.file.write(data[len(data) // 2 :])

        def mined_round(running: Any, federation: Any, round: int, state: Any) -> Any:
            state = run_round(running, federation, round, state)
            mine.armed = round == mine.round
            mine.step("after aggregate")
            return state

        def mined_checkpoint(running: Any, *inputs: Any) -> None:
            checkpoint(running, *inputs)
            mine.step("after the checkpoint")
            mine.armed = False

        sqlite3.connect = lambda *inputs, **options: connect(*inputs, factory=Connection, **options)
        fedsim.checkpoint.open = lambda *inputs: Halves(builtins.open(*inputs))  # noqa: SIM115 (closed by Halves)
        fedsim.run._Run._round, fedsim.run._Run._checkpoint = mined_round, mined_checkpoint


def run(config: Path, out: Path, fatal: int, round: int, log: Path) -> None:
    """``fedsim run`` without its pictures, mined."""
    Mine(fatal, round, log).lay()
    fedsim.run.run(load_config(config), out)


def plain_run(config: Path, out: Path) -> None:
    fedsim.run.run(load_config(config), out)


def resume(out: Path) -> None:
    """``fedsim resume`` without its pictures; a run killed before it had a configuration begins anew."""
    fedsim.run.resume(out)
