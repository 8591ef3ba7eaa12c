"""Where the time of a round goes, by kind of work: one process, one thread, fedsim's engine without Ray.

    python experiments/bench/breakdown.py --workloads tiny,cifar,digits,domains

Prints a Markdown table of shares (%) of a round's wall time: in torch's operators, as torch's profiler sees them, and
outside of them, which is Python's and the dispatcher's.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, from any folder

import torch
from torch.profiler import ProfilerActivity, profile

from experiments.bench.contenders.fedsim_ import configuration, dataset, shards
from experiments.bench.workloads import Workload, cohort, workload
from fedsim.build import federation_of, plan
from fedsim.store import ClientStore

KINDS = {
    "convolution": ("convolution",),
    "matrix products": ("addmm", "::mm", "bmm", "baddbmm", "linear_pointwise"),
    "pooling": ("pool",),
    "normalization": ("batch_norm",),
    "activation": ("clamp_min", "threshold", "relu"),
    "loss": ("softmax", "nll_loss", "exp", "log", "gather", "scatter", "amax", "::max"),
    "finite values": ("aminmax", "isfinite"),
    "copies, sums, steps": ("copy_", "add", "mul", "::mv", "sum", "div", "clone", "index", "cat", "stack", "sub"),
}
CLIENTS = {"tiny": 1000, "cifar": 8, "digits": 1, "domains": 4}  # enough to be typical


def kind(operator: str) -> str:
    return next((k for k, parts in KINDS.items() if any(p in operator for p in parts)), "other operators")


def breakdown(workload: Workload, clients: int) -> dict[str, float]:
    """Share (%) of each kind of work in the wall time of a round of so many clients."""
    data = dataset(workload)
    prepared = plan(configuration(workload, 4, workers=0, odd_block_threads=1), (data, shards(workload, data), None))
    federation, strategy = federation_of(prepared, ClientStore(), debug=True), prepared.strategy
    state = strategy.init(federation.shared)

    def round_of(number: int) -> None:
        nonlocal state
        for order in strategy.orders(number, state):
            replies = federation.train(order, cohort(workload, number)[:clients])
            state = strategy.aggregate(number, state, order, replies)

    walls = []
    for number in (1, 2, 3, 4):
        begin = time.perf_counter()
        round_of(number)
        walls.append(time.perf_counter() - begin)
    wall = min(walls)
    rounds = []
    for number in (5, 6, 7):
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            round_of(number)
        rounds.append(dict.fromkeys([*KINDS, "other operators"], 0.0))
        for event in seen.key_averages():
            if event.key.startswith(("aten::", "mkldnn::")):
                rounds[-1][kind(event.key)] += event.self_cpu_time_total / 1e6
    federation.close()
    spent = {k: median(each[k] for each in rounds) for k in rounds[0]}
    # The profiler's own cost falls on small operators: together they took at most the wall time without it.
    scale = 100 / max(wall, sum(spent.values()))
    shares = {k: s * scale for k, s in spent.items()}
    return {**shares, "Python, dispatch": max(0.0, 100 - sum(shares.values()))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default=",".join(CLIENTS), help="comma-separated (default: all four)")
    names = parser.parse_args().workloads.split(",")
    columns = {name: breakdown(workload(name), CLIENTS.get(name, 1000)) for name in names}
    print(f"| share of a round's time, % | {' | '.join(columns)} |")
    print(f"|---|{'---:|' * len(columns)}")
    for row in next(iter(columns.values())):
        print(f"| {row} | {' | '.join(f'{shares[row]:.1f}' for shares in columns.values())} |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
