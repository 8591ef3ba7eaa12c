"""What a federation's size costs: registered clients, clients a round, and private state on disk.

    python experiments/bench/scale.py
    python experiments/bench/scale.py --clients 100000,1000000 --cohort 10000 --rounds 3

Clients hold 8 images each of a pool of 4096, and train the small CNN for one epoch of batches of 4, two workers.
``fedavg`` keeps nothing on the clients. Under ``fedbn`` they keep their normalization: first of clients that have never
trained, so that there is nothing to read, then with the state of *every* registered client on disk and none of them in
memory. Reading is hidden if the rounds take the time that nothing to read takes. Prints a Markdown table; the driver's
memory is the largest resident set of this process up to then, so every row is a process of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

from fedsim.build import federation_of, plan
from fedsim.config import parse_config
from fedsim.data import Dataset, Partition
from fedsim.engine import Federation
from fedsim.store import ClientStore
from fedsim.strategy import Strategy

IMAGES, EACH, SHAPE, CLASSES = 4096, 8, (3, 16, 16), 10
BUDGET = 64 << 20  # bytes of states in memory: a small part of those on disk
WAYS = ("fedavg", "fedbn, nothing to read", "fedbn, all on disk")


def data(folder: Path, clients: int) -> tuple[Dataset, Partition]:
    draw = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", IMAGES), ("test", 16)):
        arrays[split] = (draw.integers(0, 256, (count, *SHAPE), np.uint8), draw.integers(0, CLASSES, count))
    dataset = Dataset.from_arrays("noise", folder, {"noise": arrays}, tuple(map(str, range(CLASSES))))
    indices = draw.integers(0, IMAGES, clients * EACH)
    return dataset, Partition(indices, np.arange(clients + 1) * EACH, np.zeros(clients, np.int16), dataset.domains)


def fill(store: ClientStore, federation: Federation) -> None:
    """Every client has trained, long ago."""
    state = federation.untrained
    for client in range(len(federation)):
        store.put(client, 0, state)
    store.flush()
    store.recent.clear()
    store.versions.clear()
    store.bytes = 0


def rounds(federation: Federation, strategy: Strategy, count: int) -> list[float]:
    state, seconds = strategy.init(federation.shared), []
    for round in range(1, count + 2):
        clients = federation.sample(round)
        start = time.perf_counter()
        for order in strategy.orders(round, state):
            state = strategy.aggregate(round, state, order, federation.train(order, clients))
        federation.store.flush()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def measure(way: str, clients: int, cohort: int, count: int) -> str:
    """One row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        strategy = way.partition(",")[0]
        config = parse_config(
            {
                "federation": {"clients-per-round": cohort},
                "model": {"name": "small-cnn", "norm": "bn"},
                "training": {"batch-size": 4, "lr": 0.01},
                "algorithm": {"strategy": strategy},
                "simulation": {"workers": 2},
            }
        )
        dataset, shards = data(Path(folder) / "data", clients)
        prepared = plan(config, (dataset, shards, None))
        path = Path(folder) / "clients.sqlite"
        federation = federation_of(prepared, ClientStore(path, budget=BUDGET), debug=True)
        try:
            if way.endswith("on disk"):
                fill(federation.store, federation)
            seconds = median(rounds(federation, prepared.strategy, count))
        finally:
            federation.close()
            federation.store.close()
        disk = path.stat().st_size / 2**20
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    sizes = f"{clients:,} | {cohort:,} | {disk:.0f}"
    return f"| {way} | {sizes} | {seconds:.2f} | {1e6 * seconds / cohort:.0f} | {memory:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", default="100000,1000000", help="registered clients, by commas (100000,1000000)")
    parser.add_argument("--cohort", type=int, default=10000, help="clients a round (10000)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds whose median counts, after one that does not (3)")
    parser.add_argument("--ways", default=";".join(WAYS), help="rows for each number of clients, by semicolons (all)")
    args = parser.parse_args()
    print("| | registered | a round | on disk, MB | s a round | µs a client | driver, MB |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    spawn = multiprocessing.get_context("spawn")
    for clients in map(int, args.clients.split(",")):
        for way in args.ways.split(";"):
            with spawn.Pool(1) as pool:
                print(pool.apply(measure, (way, clients, args.cohort, args.rounds)), flush=True)


if __name__ == "__main__":
    main()
