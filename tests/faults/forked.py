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

import torch._dynamo  # noqa: F401 (the counter of FLOPs imports it, which takes longer than all of a small run)

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


def _child(folder: str, environment: dict[str, str], function: Callable[..., Any], inputs: tuple[Any, ...]) -> None:
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 (the process's own streams)
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    os.environ.update(environment)
    try:
        function(*inputs)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def forked(
    function: Callable[..., Any],
    *inputs: Any,
    environment: dict[str, str] | None = None,
    timeout: float = 120.0,
    kill_after: float | None = None,
) -> Done:
    """Call a module's function in a process of its own.

    Args:
        kill_after: seconds after which it gets SIGKILL, if it is still there.

    Raises:
        TimeoutError: it is still running after ``timeout`` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        variables = {"COLUMNS": "120", **(environment or {})}
        process = CONTEXT.Process(target=_child, args=(folder, variables, function, inputs))
        process.start()
        process.join(timeout if kill_after is None else kill_after)
        late = process.exitcode is None
        if late:
            process.kill()
            process.join()
        if late and kill_after is None:
            raise TimeoutError(f"{function.__name__}{inputs}: still running after {timeout:.0f} s")
        streams = [Path(folder) / name for name in ("out", "err")]
        out, err = (s.read_text() if s.exists() else "" for s in streams)  # a process killed at once has none
        return Done(process.exitcode, out, err)


def _command(words: list[str], before: Callable[..., None] | None, extra: tuple[Any, ...]) -> None:
    if before is not None:
        before(*extra)
    sys.argv = ["fedsim", *words]
    fedsim.cli.main()


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
    return forked(_command, [str(w) for w in words], before, tuple(extra), environment=environment, timeout=timeout)
