"""Executors, threads, clients in lockstep, on models of several sizes in this process: what the rules are taken from.

    python experiments/bench/calibrate.py [--only WORDS] [--seconds 3]     # executors
    python experiments/bench/calibrate.py --threads [--only WORDS]         # threads of a client's training by the loop
    python experiments/bench/calibrate.py --lockstep [--only WORDS]        # the loop's clients abreast

A figure of the first and the last is the processor time of this thread for a client's local step, the least of several
rounds taken in turns, so that it says little of what else the machine does; of the last, beside a process that keeps
another core busy. Of the second it is time on the clock, a median, on the machine as it is and beside two processes
that keep two cores busy. The rules themselves (``choose_executor`` and ``choose_odd_block_threads`` of
``fedsim.build``, ``abreast`` of ``fedsim.lockstep``) look at the model, the batch and the device alone.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, from any folder
    import fedsim  # before torch, whose threads it tells how to wait

import torch

import fedsim.lockstep
from fedsim.build import Plan, choose_executor, choose_odd_block_threads, federation_of, plan
from fedsim.config import parse_config
from fedsim.data import Dataset, Partition
from fedsim.device_memory import kept_bytes
from fedsim.engine import Federation
from fedsim.pool import InProcess
from fedsim.store import ClientStore
from fedsim.worker import BlockResult

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
    Case("logistic", (3, 32, 32), 10, 100, classes=60),
    Case("logistic", (3, 32, 32), 10, 100, classes=100),
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
THREADS = [
    Case("small-cnn", (3, 28, 28), 32, 1, 4, norm="bn"),
    Case("lenet", (3, 28, 28), 32, 1, 4),
    Case("char-lstm", (20,), 10, 1, 4, classes=90),
    Case("mcmahan-cnn", (3, 32, 32), 10, 1, 4),
    Case("vit-tiny-32", (3, 32, 32), 8, 1, 4),
    Case("digits-cnn", (3, 28, 28), 8, 1, 4, norm="bn"),
    Case("mcmahan-cnn", (3, 32, 32), 32, 1, 4),
    Case("vit-tiny-32", (3, 32, 32), 32, 1, 4),
    Case("digits-cnn", (3, 28, 28), 32, 1, 4, norm="bn"),
]
LOCKSTEP = [
    Case("mcmahan-cnn", (3, 32, 32), 10, 8, 5),
    Case("mcmahan-cnn", (3, 32, 32), 32, 8, 2),
    Case("digits-cnn", (3, 28, 28), 8, 8, 4, norm="bn"),
    Case("digits-cnn", (3, 28, 28), 32, 8, 2, norm="bn"),
    Case("alexnet", (3, 64, 64), 4, 8, 2, norm="bn"),
    Case("alexnet", (3, 64, 64), 8, 8, 2, norm="bn"),
    Case("alexnet", (3, 128, 128), 16, 4, 2, norm="bn"),
]
ABREAST = (1, 2, 4, 8)
BUSY = "import torch; torch.set_num_threads(1); a = torch.randn(512, 512)\nwhile True: a @ a"
ROUNDS = 9  # of each number of threads, in turns


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


@contextlib.contextmanager
def made(case: Case, simulations: dict[Any, dict[str, Any]]) -> Iterator[tuple[Plan, dict[Any, Federation]]]:
    """(the last one's plan, name -> federation) of the case, with ``simulations`` of it by name."""
    with tempfile.TemporaryDirectory() as folder:
        data = dataset(case, Path(folder))
        each = case.batch * case.steps
        indices, offsets = np.tile(np.arange(each), case.clients), np.arange(case.clients + 1) * each
        shards = Partition(indices, offsets, np.zeros(case.clients, np.int16), data.domains)
        federations = {}
        for name, simulation in simulations.items():
            config = parse_config(
                {
                    "model": {"name": case.model, "norm": case.norm},
                    "training": {"batch-size": case.batch, "lr": 0.01},
                    "simulation": {"workers": 0, **simulation},
                }
            )
            planned = plan(config, (data, shards, None))
            federations[name] = federation_of(planned, ClientStore(), debug=True)
        yield planned, federations


def measure(case: Case, seconds: float) -> tuple[int, str, dict[str, float]]:
    """(parameters, ``auto``'s choice, executor -> milliseconds of a client's step)."""
    with made(case, {executor: {"executor": executor} for executor in ("loop", "vmap")}) as (planned, rounds):
        task, strategy = planned.task, planned.strategy
        size = sum(p.numel() for p in task.model.parameters())
        chosen = choose_executor(task, planned.flops[""], case.batch, "cpu")
        best = dict.fromkeys(rounds, float("inf"))
        end, turns = time.monotonic() + seconds, 0
        while turns < 3 or time.monotonic() < end:
            for executor, federation in rounds.items():
                order = strategy.orders(1, strategy.init(federation.shared))[0]
                start = time.thread_time()
                federation.train(order, range(case.clients))
                if turns:  # the first loads what a first step loads
                    best[executor] = min(best[executor], time.thread_time() - start)
            turns += 1
        return size, chosen, {e: 1000 * t / case.clients / case.steps for e, t in best.items()}


def measure_threads(case: Case) -> tuple[int, dict[int, float]]:
    """(FLOPs of one example's forward pass, threads -> milliseconds of a client's step)."""
    numbers = {count: {"executor": "loop", "threads": count, "odd-block-threads": 1} for count in (1, 2)}
    with made(case, numbers) as (planned, federations):
        taken: dict[int, list[float]] = {count: [] for count in numbers}
        for _ in range(ROUNDS):
            for count, federation in federations.items():
                order = planned.strategy.orders(1, planned.strategy.init(federation.shared))[0]
                start = time.perf_counter()
                federation.train(order, range(case.clients))
                taken[count].append(time.perf_counter() - start)
        return planned.flops[""], {n: 1000 * statistics.median(t[1:]) / case.steps for n, t in taken.items()}


def measure_lockstep(case: Case, seconds: float) -> tuple[float, int, dict[int, float]]:
    """(megabytes of a client's activations, clients abreast by rule, clients abreast -> milliseconds of a step)."""
    whole = {"executor": "loop", "block": case.clients, "odd-block-threads": 1}
    with made(case, {"whole": whole}) as (planned, federations):
        (federation,) = federations.values()
        assert isinstance(federation.pool, InProcess)
        worker, strategy = federation.pool.worker, planned.strategy
        order = strategy.orders(1, strategy.init(federation.shared))[0]
        clients = list(range(case.clients))
        block = worker.block(order, clients, [federation.packed(c) for c in clients], BlockResult())
        kept = kept_bytes(worker.task, torch.zeros(case.batch, *case.shape))
        rule = fedsim.lockstep.abreast(worker.task, block, kept)
        best = {count: float("inf") for count in ABREAST if count <= case.clients}
        end, turns = time.monotonic() + seconds, 0
        with mock.patch("fedsim.lockstep.BYTES", 1 << 40):
            while turns < 4 or time.monotonic() < end:
                for count in best:
                    with mock.patch("fedsim.lockstep.MOST", count):
                        start = time.thread_time()
                        federation.train(order, clients)
                        taken = time.thread_time() - start
                    if turns:
                        best[count] = min(best[count], taken)
                turns += 1
        return kept / 1e6, rule, {n: 1000 * t / case.clients / case.steps for n, t in best.items()}


@contextlib.contextmanager
def busy(cores: int) -> Iterator[None]:
    """A machine with so many cores less than it seems to have."""
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(cores)]
    try:
        time.sleep(5)  # until they have torch
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def tell_threads(cases: list[Case]) -> None:
    found = [measure_threads(case) for case in cases]
    with busy(2):
        beside = [measure_threads(case)[1] for case in cases]
    print("| model | batch | forward, MFLOP | one thread, ms a step | two | two / one | on busy cores | rule |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for case, (flops, ms), slow in zip(cases, found, beside):
        chosen = choose_odd_block_threads("loop", flops, case.batch, "cpu")
        row = [case, case.batch, f"{flops * case.batch / 1e6:.0f}", f"{ms[1]:.3g}", f"{ms[2]:.3g}"]
        ratios = [f"{ms[2] / ms[1]:.2f}", f"{slow[2] / slow[1]:.2f}", chosen]
        print("| " + " | ".join(map(str, row + ratios)) + " |", flush=True)


def tell_lockstep(cases: list[Case], seconds: float) -> None:
    counts = " | ".join(f"{count} / 1" for count in ABREAST[1:])
    print(f"| model | batch | activations, MB | 1 client, ms a step | {counts} | rule |")
    print(f"|---|---:|---:|---:|{'---:|' * len(ABREAST)}")
    with busy(1):  # as beside a worker
        for case in cases:
            kept, rule, ms = measure_lockstep(case, seconds)
            ratios = [f"{ms[count] / ms[1]:.2f}" if count in ms else "" for count in ABREAST[1:]]
            row = [case, case.batch, f"{kept:.1f}", f"{ms[1]:.3g}", *ratios, rule]
            print("| " + " | ".join(map(str, row)) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name begins with this")
    parser.add_argument("--threads", action="store_true", help="one thread and two, in place of the executors")
    parser.add_argument("--lockstep", action="store_true", help="the loop's clients in lockstep, in place of executors")
    parser.add_argument("--seconds", type=float, default=3.0, help="of measurement a case")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.threads:
        tell_threads([case for case in THREADS if str(case).startswith(asked.only)])
        return
    if asked.lockstep:
        tell_lockstep([case for case in LOCKSTEP if str(case).startswith(asked.only)], asked.seconds)
        return
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
