"""A connection that breaks, or falls silent, while a message is on its way: the run ends as if nothing had been."""

import select
import socket
import threading
import time

import pytest

from fedsim.deployment import connection, keys
from fedsim.deployment.client import work
from fedsim.deployment.site import Site
from tests.conftest import DOMAINS
from tests.deployment.conftest import free_port
from tests.deployment.test_same_bits import simulated

pytestmark = pytest.mark.slow


def relay(port: int, to: int, cuts: list[int], silent: bool) -> None:
    """Pass bytes between clients and server. The connections accepted first end after so many bytes of both directions
    together: closed, or ``silent``, open but passing nothing on. Later ones pass all."""
    listener = socket.create_server(("127.0.0.1", port))
    print("relay ready", flush=True)

    def serve(near: socket.socket, most: float) -> None:
        far, passed, ended = socket.create_connection(("127.0.0.1", to)), 0, False
        other = {near: far, far: near}
        while passed < most and not ended:
            for end in select.select([near, far], [], [])[0]:
                data = end.recv(1 << 16)
                if not data:
                    ended = True
                    break
                other[end].sendall(data[: max(0, int(min(most - passed, len(data))))])
                passed += len(data)
        if not ended:
            print(f"cut after {most} bytes", flush=True)
            if silent:
                time.sleep(1000)
        near.close()
        far.close()

    while True:
        near, _ = listener.accept()
        most = cuts.pop(0) if cuts else float("inf")
        threading.Thread(target=serve, args=(near, most), daemon=True).start()


def run_through(deployment, cuts: list[int], silent: bool = False) -> str:
    """The log of the relay, after a run in which one client is behind it."""
    port = free_port()
    middle = deployment._start("relay", lambda: relay(port, deployment.port, list(cuts), silent))
    middle.until("relay ready")
    server = deployment.server()
    server.until("listening")  # the relay uses up a cut on every connection, also on one that leads nowhere
    clients = [deployment.client(domain) for domain in DOMAINS[1:]]

    def behind() -> None:
        connection.TIMEOUT = 2.0  # a silent line is noticed after a minute otherwise
        site = Site(DOMAINS[0], str(deployment.dataset.folder), deployment.folder / "state" / DOMAINS[0])
        secret = keys.read_key(deployment.pki / f"{DOMAINS[0]}.key")
        work(f"127.0.0.1:{port}", deployment.pki / "ca.crt", secret, site, give_up=60)

    clients.append(deployment._start(DOMAINS[0], behind))
    assert server.wait() == 0, server.text()
    assert [c.wait() for c in clients] == [0, 0, 0]
    assert "Traceback" not in clients[-1].text()
    return middle.text()


@pytest.mark.parametrize("silent", [False, True], ids=["cut", "silent"])
def test_a_line_that_fails_mid_transfer(deploy, dataset, silent):
    deployment = deploy(algorithm={"strategy": "fedbn"}, rounds=8)
    cuts = [1, 2000, 8000, 20_000, 60_000] if silent else [1, 700, 2500, 8000, 14_000, 20_000, 30_000, 60_000]
    log = run_through(deployment, cuts, silent)
    assert log.count("cut after") == len(cuts), log
    found, expected = deployment.summary(), simulated(dataset, deployment.config, deployment.folder / "simulated")
    assert found["state_sha256"] == expected["state_sha256"]
    assert found["rejected_updates"] == 0
    assert found["retried_clients"] > 0  # at least one cut fell into an order
