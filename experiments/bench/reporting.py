"""What every contender says when it has finished: one line, the same form for all. Standard library only."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import pairwise

MARK = "RESULT "


class BenchError(Exception):
    """A contender that gave no result, in one line."""


@dataclass(frozen=True)
class Result:
    """One run of one contender.

    Attributes:
        seconds: of every round, the first included (its start-up, its compilation).
        loss: training loss of the final model on the clients of ``workloads.judges``.
        versions: package -> version, and "python".
        notes: choices the contender made itself (an executor, a block size).
    """

    contender: str
    workload: str
    seconds: list[float]
    loss: float
    versions: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def line(self) -> str:
        return MARK + json.dumps(asdict(self))


def result(
    contender: str, workload: str, stamps: Sequence[float], loss: float, *packages: str, **notes: object
) -> Result:
    """Args: stamps: ``time.perf_counter()`` at the start of every round and at the end of the last."""
    seconds = [round(later - earlier, 6) for earlier, later in pairwise(stamps)]
    versions = {"python": platform.python_version()} | {package: version(package) for package in packages}
    return Result(contender, workload, seconds, float(loss), versions, {k: str(v) for k, v in notes.items()})


def parse(output: str) -> Result:
    """The result in a contender's output.

    Raises:
        BenchError: it printed none.
    """
    lines = [line for line in output.splitlines() if line.startswith(MARK)]
    if not lines:
        raise BenchError("ended without a result")
    return Result(**json.loads(lines[-1].removeprefix(MARK)))


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """The options that all contenders have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", default="tiny", help="tiny, tiny-K, cifar, digits or domains (default: tiny)")
    parser.add_argument("--rounds", type=int, default=4, help="rounds, the first included (default: 4)")
    return parser
