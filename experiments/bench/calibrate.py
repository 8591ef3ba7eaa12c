"""Both executors on models of several sizes, in this process: the table from which ``auto``'s rule is taken.

    python experiments/bench/calibrate.py [--only WORDS] [--seconds 3]

A figure is the processor time of this thread for a client's local step, the least of several rounds taken in turns, so
that it says little of what else the machine does. The rule itself (``fedsim.build.choose_executor``) looks at the model
and the device alone.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, from any folder

from fedsim.build import choose_executor, federation_of, plan
from fedsim.config import parse_config
from fedsim.data import Dataset, Partition
from fedsim.store import ClientStore

WORKERS = 2  # that the loop keeps busy, while a round of vmap may be one block


@dataclass(frozen=True)
class Case:
    """``clients`` a round, each of ``steps`` batches."""

    model: str
    shape: tuple[int, ...]
    batch: int
    clients: int
    steps: int = 2
    norm: str = "none"
    classes: int = 10

    def __str__(self) -> str:
        norm = "" if self.norm == "none" else f", {self.norm}"
        return f"{self.model} {'x'.join(map(str, self.shape))}{norm}"


CASES = [
    Case("logistic", (60,), 10, 1000),
    Case("logistic", (784,), 10, 200),
    Case("logistic", (3, 32, 32), 10, 100),
    Case("logistic", (3, 32, 32), 10, 100, classes=30),
    Case("logistic", (3, 64, 64), 10, 50, classes=100),
    Case("logistic", (3, 64, 64), 32, 20, classes=300),
    Case("small-cnn", (3, 16, 16), 4, 50, norm="bn"),
    Case("small-cnn", (3, 16, 16), 32, 20, norm="bn"),
    Case("small-cnn", (3, 28, 28), 4, 50, norm="bn"),
    Case("small-cnn", (3, 28, 28), 32, 10, norm="bn"),
    Case("small-cnn", (3, 28, 28), 4, 50, norm="gn"),
    Case("lenet", (3, 28, 28), 4, 20),
    Case("lenet", (3, 28, 28), 32, 10),
    Case("mcmahan-cnn", (3, 32, 32), 10, 8),
    Case("digits-cnn", (3, 28, 28), 32, 2, steps=1, norm="bn"),
    Case("small-char-lstm", (20,), 10, 20, classes=90),
    Case("char-lstm", (20,), 10, 10, classes=90),
    Case("vit-tiny-32", (3, 32, 32), 8, 4, steps=1),
]


def dataset(case: Case, folder: Path) -> Dataset:
    """Noise: what is in the examples costs nothing. Sequences have a label at every position."""
    draw, count = np.random.default_rng(0), case.batch * case.steps
    if "lstm" in case.model:
        x = draw.integers(0, case.classes, (count, *case.shape))
        y = x
    elif len(case.shape) == 1:
        x = draw.normal(size=(count, *case.shape)).astype(np.float32)
        y = draw.integers(0, case.classes, count)
    else:
        x = draw.integers(0, 256, (count, *case.shape), dtype=np.uint8)
        y = draw.integers(0, case.classes, count)
    arrays = {"noise": {"train": (x, y), "test": (x[:1], y[:1])}}
    return Dataset.from_arrays("noise", folder, arrays, tuple(map(str, range(case.classes))))


def measure(case: Case, seconds: float) -> tuple[int, str, dict[str, float]]:
    """(parameters, ``auto``'s choice, executor -> milliseconds of a client's step)."""
    with tempfile.TemporaryDirectory() as folder:
        data = dataset(case, Path(folder))
        each = case.batch * case.steps
        indices, offsets = np.tile(np.arange(each), case.clients), np.arange(case.clients + 1) * each
        shards = Partition(indices, offsets, np.zeros(case.clients, np.int16), data.domains)
        rounds = {}
        for executor in ("loop", "vmap"):
            config = parse_config(
                {
                    "model": {"name": case.model, "norm": case.norm},
                    "training": {"batch-size": case.batch, "lr": 0.01},
                    "simulation": {"executor": executor, "workers": 0},
                }
            )
            planned = plan(config, (data, shards, None))
            rounds[executor] = federation_of(planned, ClientStore(), debug=True), planned.strategy
        task = planned.task
        size = sum(p.numel() for p in task.model.parameters())
        chosen = choose_executor(task, planned.flops[""], case.batch, "cpu")
        best = dict.fromkeys(rounds, float("inf"))
        end, turns = time.monotonic() + seconds, 0
        while turns < 3 or time.monotonic() < end:
            for executor, (federation, strategy) in rounds.items():
                order = strategy.orders(1, strategy.init(federation.shared))[0]
                start = time.thread_time()
                federation.train(order, range(case.clients))
                if turns:  # the first loads what a first step loads
                    best[executor] = min(best[executor], time.thread_time() - start)
            turns += 1
        return size, chosen, {e: 1000 * t / case.clients / case.steps for e, t in best.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name begins with this")
    parser.add_argument("--seconds", type=float, default=3.0, help="of measurement a case")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print("| model | parameters | batch | clients | loop, ms a step | vmap, ms a step | loop / vmap | auto |")
    print("|---|---:|---:|---:|---:|---:|---:|---|")
    for case in CASES:
        if not str(case).startswith(asked.only):
            continue
        size, chosen, ms = measure(case, asked.seconds)
        ratio = ms["loop"] / ms["vmap"]
        slower = ratio < 1 if chosen == "vmap" else ratio > WORKERS
        row = [case, f"{size:,}", case.batch, case.clients, f"{ms['loop']:.3g}", f"{ms['vmap']:.3g}", f"{ratio:.2f}"]
        print("| " + " | ".join(map(str, row)) + f" | {chosen}{', the slower' if slower else ''} |", flush=True)


if __name__ == "__main__":
    main()
