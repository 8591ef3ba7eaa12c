"""A long run of a hundred tiny clients on two Ray workers, and what it takes of the machine, round by round.

``python -m tests.faults.soak FOLDER [ROUNDS]`` runs it (2,000 rounds unless said otherwise) into FOLDER and prints a
table; FOLDER/soak.jsonl has a line a checkpoint. Memory and open files are read from /proc, so Linux alone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import fedsim.run
from fedsim.config import load_config
from fedsim.results.store import MetricStore
from fedsim.store import ClientStore
from tests.faults.place import write_tree

CONFIG = """name = "soak"
rounds = {rounds}
[federation]
dataset = "folder"
root = "{root}"
image-size = 8
clients-per-domain = 50
[model]
name = "logistic"
[training]
batch-size = 4
lr = 0.01
[algorithm]
strategy = "fedhyper-g-cl"
[simulation]
workers = 2
executor = "vmap"
block = 50
[evaluation]
every = 10
"""
EVERY = 10  # rounds a checkpoint, as by default
SETTLED = 200  # round from which everything must be flat


def descendants(root: int) -> list[int]:
    """Process numbers of all children, their children, ..."""
    parent = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent[int(folder.name)] = int((folder / "stat").read_text().rpartition(") ")[2].split()[1])
        except (OSError, ValueError):  # it ended meanwhile
            continue
    found, layer = [], [root]
    while layer := [child for child, of in parent.items() if of in layer]:
        found += layer
    return found


def resident(process: int) -> int:
    """Bytes in memory that are the process's own: without pages of files and of the object store, which are shared."""
    try:
        status = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def ray_workers(root: int) -> list[int]:
    """Among the descendants, by Ray's title (but idle ones); in one start of thirty Ray gives none, to nobody."""
    found = []
    for process in descendants(root):
        try:
            program, *arguments = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        titled = program.startswith(b"ray::") and b"IDLE" not in program
        if titled or (arguments and arguments[0].endswith(b"/default_worker.py")):
            found.append(process)
    return found


class Clock:
    """Seconds spent in methods of the stores since it was last read."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, owner: type, name: str) -> None:
        method = getattr(owner, name)

        def timed(*inputs: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return method(*inputs, **options)
            finally:
                self.seconds += time.perf_counter() - started

        setattr(owner, name, timed)

    def read(self) -> float:
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def soak(folder: Path, rounds: int) -> None:
    """Run, and append a line to FOLDER/soak.jsonl at every checkpoint."""
    write_tree(folder / "tree", per_class=60)
    config = folder / "soak.toml"
    config.write_text(CONFIG.format(root=folder / "tree", rounds=rounds))
    clock, checkpoint, before = Clock(), fedsim.run._Run._checkpoint, time.perf_counter()
    for owner, names in ((MetricStore, ("add", "commit")), (ClientStore, ("flush", "prune"))):
        for name in names:
            clock.around(owner, name)

    def sampled(running: Any, federation: Any, round: int, state: Any) -> None:
        nonlocal before
        checkpoint(running, federation, round, state)
        now = time.perf_counter()
        line = {
            "round": round,
            "resident": resident(os.getpid()),
            "ray": sum(map(resident, ray_workers(os.getpid()))),
            "files": len(os.listdir("/proc/self/fd")),
            "database": clock.read() / EVERY,
            "round_seconds": (now - before) / EVERY,
        }
        before = now
        with open(folder / "soak.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    fedsim.run._Run._checkpoint = sampled  # type: ignore[method-assign]
    fedsim.run.run(load_config(config), folder / "run")


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "soak.jsonl").read_text().splitlines()]


def table(folder: Path, rows: int = 10) -> Iterator[str]:
    """Medians of equal stretches of the run."""
    yield "| rounds | main process (MiB) | Ray (MiB) | open files | database (ms a round) | round (ms) |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    found = np.array(lines(folder), dtype=object)
    for part in np.array_split(found, min(rows, len(found))):
        middle = {key: float(np.median([line[key] for line in part])) for key in part[0]}
        memory = [f"{middle[key] / 2**20:.1f}" for key in ("resident", "ray")]
        times = [f"{1000 * middle[key]:.2f}" for key in ("database", "round_seconds")]
        cells = [f"{part[0]['round']} to {part[-1]['round']}", *memory, f"{middle['files']:.0f}", *times]
        yield "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True)
    soak(target, int(sys.argv[2]) if len(sys.argv) > 2 else 2000)
    print("\n".join(table(target)))
