"""The ideal pool: persistent forked workers of one thread, server state in shared memory, a partial sum in the worker,
clients taken from a shared counter. What an engine adds to this is its overhead."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from typing import Any

import torch
from torch import Tensor, multiprocessing

from experiments.bench.reporting import Result, arguments, result
from experiments.bench.torch_side import build_model, final_loss, flat, private_names, shard, train, views
from experiments.bench.workloads import Workload, cohort, load, workload


@dataclass(frozen=True)
class Board:
    """What server and workers share: tensors in shared memory, the next client's place in the cohort, signals."""

    theta: Tensor  # [P]
    totals: Tensor  # [processes, P], each worker's weighted sum
    kept: Tensor  # [clients, private P]
    next: Synchronized
    round: Any  # 0: no more rounds
    start: list[Any]
    done: Any


def work(workload: Workload, number: int, board: Board) -> None:
    torch.set_num_threads(1)
    x, y = load(workload)
    model = build_model(workload)
    state = model.state_dict()
    private = private_names(workload, model)
    shared = [n for n, _ in model.named_parameters() if n not in private]
    server, sums = views(board.theta, state, shared), views(board.totals[number], state, shared)
    while True:
        board.start[number].acquire()
        if not board.round.value:
            return
        clients = cohort(workload, board.round.value)
        board.totals[number].zero_()
        while True:
            with board.next.get_lock():
                place = board.next.value
                board.next.value += 1
            if place >= len(clients):
                break
            mine = views(board.kept[clients[place]], state, private)
            for names, values in ((shared, server), (private, mine)):
                for name, value in zip(names, values):
                    state[name].copy_(value)
            train(model, *shard(x, y, clients[place]), workload.lr, workload.batch)
            for name, value in zip(private, mine):
                value.copy_(state[name])
            for name, value in zip(shared, sums):
                value.add_(state[name], alpha=workload.examples)
        board.done.release()


def run(workload: Workload, rounds: int, processes: int = 2) -> Result:
    torch.set_num_threads(1)
    model = build_model(workload)
    state = model.state_dict()
    private = private_names(workload, model)
    shared = [n for n, _ in model.named_parameters() if n not in private]
    theta = flat(state, shared)
    fork = multiprocessing.get_context("fork")
    board = Board(
        theta.share_memory_(),
        torch.zeros(processes, len(theta)).share_memory_(),
        flat(state, private).repeat(workload.clients, 1).share_memory_(),
        fork.Value("i", 0),
        fork.Value("i", 0, lock=False),
        [fork.Semaphore(0) for _ in range(processes)],
        fork.Semaphore(0),
    )
    workers = [fork.Process(target=work, args=(workload, i, board), daemon=True) for i in range(processes)]
    for worker in workers:
        worker.start()
    stamps = []
    for round in range(1, rounds + 1):
        stamps.append(time.perf_counter())
        board.round.value, board.next.value = round, 0
        for signal in board.start:
            signal.release()
        for _ in workers:
            board.done.acquire()
        torch.sum(board.totals, 0, out=board.theta).div_(workload.samples)
    stamps.append(time.perf_counter())
    board.round.value = 0
    for signal in board.start:
        signal.release()
    for worker in workers:
        worker.join()
    personal = (
        {c: dict(zip(private, views(row, state, private))) for c, row in enumerate(board.kept)} if private else {}
    )
    loss = final_loss(workload, dict(zip(shared, views(board.theta, state, shared))), personal)
    tuned = "MALLOC_TRIM_THRESHOLD_" in os.environ
    return result(f"processes-{processes}", workload.name, stamps, loss, "torch", "numpy", tuned_malloc=tuned)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--processes", type=int, default=2, help="workers (default: 2)")
    chosen = parser.parse_args()
    print(run(workload(chosen.workload), chosen.rounds, chosen.processes).line())
