"""Who adds the sums of a large model's blocks: the driver, or actors that are there for it (eight workers or more).

    python experiments/bench/sums.py
    python experiments/bench/sums.py --model mcmahan-cnn --clients 50

Every client is a block of its own and takes one step, so that as many sums as possible are to be added. Two workers,
FedAvg, noise. The numbers a run ends with are the same either way; what differs is what is left to the driver, in
processor time and in memory (its largest resident set, with the pages of Ray's store that it looked at; the actors' own
is not in it). The two ways take turns, each start in a process of its own. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from fedsim.build import federation_of, plan
from fedsim.checkpoint import state_sha256
from fedsim.config import parse_config
from fedsim.data import Dataset, Partition
from fedsim.store import ClientStore

EACH, CLASSES = 32, 10  # examples of a client: one batch
SHAPES = {"digits-cnn": (3, 28, 28), "mcmahan-cnn": (3, 32, 32)}
WAYS = {"driver": False, "actors": True}


@dataclass(frozen=True)
class Start:
    """What one start took.

    Attributes:
        seconds: of each round. own: the driver's processor time of each. memory: the driver's, MB.
        ending: SHA-256 of the state it ended with.
    """

    seconds: list[float]
    own: list[float]
    memory: float
    ending: str


def measure(way: str, model: str, clients: int, rounds: int) -> Start:
    draw, size = np.random.default_rng(0), clients * EACH
    inputs, labels = draw.integers(0, 256, (size, *SHAPES[model]), np.uint8), draw.integers(0, CLASSES, size)
    split = {"train": (inputs, labels), "test": (inputs[:EACH], labels[:EACH])}
    config = parse_config(
        {
            "model": {"name": model, "norm": "bn" if model == "digits-cnn" else "none"},
            "training": {"batch-size": EACH, "lr": 0.01},
            "simulation": {"workers": 2, "block": 1},
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        dataset = Dataset.from_arrays("noise", Path(folder), {"noise": split}, tuple(map(str, range(CLASSES))))
        offsets, domain = np.arange(clients + 1) * EACH, np.zeros(clients, np.int16)
        shards = Partition(np.arange(size), offsets, domain, dataset.domains)
        prepared = plan(config, (dataset, shards, None))
        federation, strategy = federation_of(prepared, ClientStore(), debug=True), prepared.strategy
        federation.pool.apart = WAYS[way]
        try:
            state, seconds, own = strategy.init(federation.shared), [], []
            for round in range(1, rounds + 2):
                start, before = time.perf_counter(), time.process_time()
                for order in strategy.orders(round, state):
                    state = strategy.aggregate(round, state, order, federation.train(order, range(clients)))
                seconds.append(time.perf_counter() - start)
                own.append(time.process_time() - before)
        finally:
            federation.close()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return Start(seconds[1:], own[1:], memory, state_sha256(state))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="digits-cnn", help="14 or 2 million parameters (digits-cnn)")
    parser.add_argument("--clients", type=int, default=50, help="a round, each a block (50)")
    parser.add_argument(
        "--rounds", type=int, default=3, help="rounds of a start that count, after one that does not (3)"
    )
    parser.add_argument("--starts", type=int, default=2, help="of each way, in turns (2)")
    args = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    found: dict[str, list[Start]] = {way: [] for way in WAYS}
    for _ in range(args.starts):
        for way, starts in found.items():
            with spawn.Pool(1) as pool:
                starts.append(pool.apply(measure, (way, args.model, args.clients, args.rounds)))
    assert len({start.ending for starts in found.values() for start in starts}) == 1, "the two ways end differently"
    print("| sums added by | s a round | driver's processor time, s a round | driver, MB |")
    print("|---|---:|---:|---:|")
    for way, starts in found.items():
        seconds = median(value for start in starts for value in start.seconds)
        own = median(value for start in starts for value in start.own)
        print(f"| {way} | {seconds:.2f} | {own:.2f} | {max(start.memory for start in starts):.0f} |")


if __name__ == "__main__":
    main()
