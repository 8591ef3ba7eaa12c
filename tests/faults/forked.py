"""Commands in processes of their own, forked from a server that has imported everything: a tenth of a second each.

The server is multiprocessing's forkserver, a clean process: what a test ran before (Ray, threads) is not in it.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fedsim.cli
import fedsim.deployment.client
import fedsim.recipes
import fedsim.registry
import fedsim.results.compare
import fedsim.results.costs
import fedsim.results.plots
import fedsim.run

fedsim.registry.load()
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.faults.forked"])


@dataclass(frozen=True)
class Done:
    """Exit code (negative: the signal that ended it) and streams of a command."""

    code: int
    out: str
    err: str


def _child(words: list[str], folder: str, environment: dict[str, str], before: Callable[..., None] | None, extra: Any):
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 (the process's own streams)
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    os.environ.update(environment)
    if before is not None:
        before(*extra)
    sys.argv = ["fedsim", *words]
    try:
        fedsim.cli.main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def fedsim_command(
    *words: object,
    environment: dict[str, str] | None = None,
    before: Callable[..., None] | None = None,
    extra: Sequence[Any] = (),
    timeout: float = 120.0,
) -> Done:
    """``fedsim WORDS...`` in a process of its own.

    Args:
        before: a module's function, called with ``extra`` in that process before the command; it lays the mines.
    """
    with tempfile.TemporaryDirectory() as folder:
        variables = {"COLUMNS": "120", **(environment or {})}
        inputs = ([str(w) for w in words], folder, variables, before, tuple(extra))
        process = CONTEXT.Process(target=_child, args=inputs)
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutError(f"fedsim {' '.join(map(str, words))}: still running after {timeout:.0f} s")
        out, err = ((Path(folder) / name).read_text() for name in ("out", "err"))
        return Done(process.exitcode, out, err)
