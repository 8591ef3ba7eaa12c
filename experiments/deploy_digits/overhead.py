"""Seconds a round takes beside the clients' own training: four client processes on loopback, TLS and signed calls.

    python experiments/deploy_digits/overhead.py [--rounds N] [--stock]

Each round sends a model of so many parameters to every client, takes one of the same size back, checks and averages
them; nobody trains. Ours also writes the round's checkpoint. ``--stock`` measures Flower's own SuperLink, SuperNodes
and ``flwr run`` with FedAvg beside it (minutes: it starts a process a message).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from logging import CRITICAL, disable
from pathlib import Path

import torch
from flwr.app import Message, RecordDict
from stock import stock_rounds

from fedsim.checkpoint import Checkpoints, Snapshot
from fedsim.deployment import fleet, keys
from fedsim.deployment.connection import Connection, Lost
from fedsim.deployment.federation import Patience, exchange
from fedsim.deployment.link import Link
from fedsim.deployment.wire import pack, unpack
from fedsim.flower import order_content, read_order, read_reply, reply_content
from fedsim.fold import Partial, mean
from fedsim.guard import refuse
from fedsim.processes import keep_memory
from fedsim.types import Order, Reply, Tensors

CLIENTS = 4
SIZES = {"0.1 M": 100_000, "1 M": 1_000_000, "14.2 M": 14_200_000}
PATIENCE = Patience(60.0, 600.0, 600.0)


def echo(folder: Path, name: str, port: int) -> None:
    """A client that sends every model back."""
    torch.set_num_threads(1)
    keep_memory()
    key = keys.read_key(folder / f"{name}.key")
    connection = Connection(f"127.0.0.1:{port}", folder / "ca.crt", key)
    while True:
        try:
            message = connection.receive()
        except Lost:  # the server has measured enough
            return
        if message is None:
            continue
        order = read_order(unpack(message.content))
        reply = Reply(0, 1, {n: v + 1 for n, v in order.shared.items()}, {}, {"loss": 0.0})
        connection.reply(Message(pack(reply_content(reply, 0)), reply_to=message))


def one_round(link: Link, members: dict, model: Tensors, round: int, checkpoints: Checkpoints) -> Tensors:
    """The new model: what ``RemoteFederation.train``, the strategy's mean and the round loop do."""
    order = Order(round, model)
    content = pack(order_content(order))
    with fleet.no_object_id_recompute():
        errand = exchange(link, members, lambda client: RecordDict(dict(content)), "train", PATIENCE)
    partials = []
    for client in members:
        reply, *_ = read_reply(unpack(errand.answers[client].content), [order])
        assert refuse(reply.shared, model) is None, "an echo is a good update"
        partials.append(Partial.of(reply.shared, float(reply.examples)))
    model = mean(partials, model)
    checkpoints.save(Snapshot(round, model, {}))
    return model


def measure(folder: Path, rounds: int, pipe) -> None:
    """The server, in a process of its own: gRPC must not be running where the clients are forked from."""
    disable(CRITICAL)
    torch.set_num_threads(1)
    keep_memory()
    link = Link("127.0.0.1:0", cert=folder / "server.crt", key=folder / "server.key", clients=folder / "known")
    pipe.send(link.port)
    processes = [os.getpid(), *pipe.recv()]
    members = dict(enumerate(link.members.all()))
    while not all(link.members.present(m, 60.0) for m in members.values()):
        time.sleep(0.05)
    for label, size in SIZES.items():
        model, seconds, busy = {f"layer{i}": torch.ones(size // 10) for i in range(10)}, [], []
        checkpoints = Checkpoints(folder / label.replace(" ", ""))
        for round in range(1, rounds + 2):
            started, before = time.perf_counter(), cpu_seconds(processes)
            model = one_round(link, members, model, round, checkpoints)
            seconds.append(time.perf_counter() - started)
            busy.append(cpu_seconds(processes) - before)
        assert all(bool((v == 2 + rounds).all()) for v in model.values()), "every client has added one a round"
        report("fedsim", label, seconds[1:], busy[1:])
    os._exit(0)


def cpu_seconds(processes: list[int]) -> float:
    """Processor time of processes so far, which other users of the machine do not change (much)."""
    ticks = 0
    for process in processes:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def report(who: str, label: str, seconds: list[float], busy: list[float] | None = None) -> None:
    processor = f"{statistics.median(busy):.2f} s of processor time; " if busy else ""
    print(
        f"{who:>6} {label:>7} parameters: {statistics.median(seconds):6.2f} s a round (median of {len(seconds)};"
        f" {min(seconds):.2f} to {max(seconds):.2f}; {processor}{CLIENTS} clients; load {os.getloadavg()[0]:.1f} on"
        f" {len(os.sched_getaffinity(0))} cores)",
        flush=True,
    )


def ours(rounds: int) -> None:
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        keys.make_ca(folder)
        keys.make_server(folder, ["127.0.0.1"])
        for i in range(CLIENTS):
            keys.register(keys.make_node(folder, f"client{i}"), folder / "known")
        near, far = fork.Pipe()
        server = fork.Process(target=measure, args=(folder, rounds, far))
        server.start()
        port = near.recv()
        clients = [fork.Process(target=echo, args=(folder, f"client{i}", port), daemon=True) for i in range(CLIENTS)]
        for client in clients:
            client.start()
        near.send([client.pid for client in clients])
        server.join()
        for client in clients:
            client.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stock", action="store_true", help="Flower's own deployment too")
    chosen = parser.parse_args()
    ours(chosen.rounds)
    if chosen.stock:
        for label, size in SIZES.items():
            report("stock", label, stock_rounds(size, chosen.rounds, CLIENTS))


if __name__ == "__main__":
    main()
