"""Seconds a round takes beside the clients' own training: four client processes on loopback, TLS and signed calls.

    python experiments/deploy_digits/overhead.py [ROUNDS]

Each round sends a model of so many parameters to every client and takes one of the same size back; nobody trains.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from logging import CRITICAL, disable
from pathlib import Path

import torch
from flwr.app import Message, RecordDict

from fedsim.deployment import keys
from fedsim.deployment.connection import Connection
from fedsim.deployment.federation import Patience, exchange
from fedsim.deployment.link import Link
from fedsim.deployment.wire import pack, unpack
from fedsim.flower import order_content, read_order, read_reply, reply_content
from fedsim.types import Order, Reply

CLIENTS = 4
SIZES = {"0.1 M": 100_000, "1 M": 1_000_000, "14.2 M": 14_200_000}
PATIENCE = Patience(60.0, 600.0, 600.0)


def echo(folder: Path, name: str, port: int) -> None:
    """A client that sends every model back."""
    key = keys.read_key(folder / f"{name}.key")
    connection = Connection(f"127.0.0.1:{port}", folder / "ca.crt", key)
    while True:
        message = connection.receive()
        if message is None:
            continue
        order = read_order(unpack(message.content))
        reply = Reply(0, 1, {n: v + 1 for n, v in order.shared.items()}, {}, {"loss": 0.0})
        connection.reply(Message(pack(reply_content(reply, 0)), reply_to=message))


def measure(folder: Path, rounds: int, pipe) -> None:
    """The server, in a process of its own: gRPC must not be running where the clients are forked from."""
    disable(CRITICAL)
    link = Link("127.0.0.1:0", cert=folder / "server.crt", key=folder / "server.key", clients=folder / "known")
    pipe.send(link.port)
    members = dict(enumerate(link.members.all()))
    while not all(link.members.present(m, 60.0) for m in members.values()):
        time.sleep(0.05)
    for label, size in SIZES.items():
        model, seconds = {f"layer{i}": torch.zeros(size // 10) for i in range(10)}, []
        for round in range(1, rounds + 2):
            started = time.perf_counter()
            content = pack(order_content(Order(round, model)))
            errand = exchange(link, members, lambda client, c=content: RecordDict(dict(c)), "train", PATIENCE)
            replies = [read_reply(unpack(errand.answers[c].content))[0].shared for c in members]
            model = {n: sum(r[n] for r in replies) / len(replies) for n in model}
            seconds.append(time.perf_counter() - started)
        middle = sorted(seconds[1:])[len(seconds[1:]) // 2]
        print(f"{label:>7} parameters: {middle:.2f} s a round (median of {rounds}, {CLIENTS} clients)", flush=True)
    os._exit(0)


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        keys.make_ca(folder)
        keys.make_server(folder, ["127.0.0.1"])
        for i in range(CLIENTS):
            keys.register(keys.make_node(folder, f"client{i}"), folder / "known")
        ours, theirs = fork.Pipe()
        server = fork.Process(target=measure, args=(folder, rounds, theirs))
        server.start()
        port = ours.recv()
        clients = [fork.Process(target=echo, args=(folder, f"client{i}", port), daemon=True) for i in range(CLIENTS)]
        for client in clients:
            client.start()
        server.join()
        for client in clients:
            client.kill()


if __name__ == "__main__":
    main()
