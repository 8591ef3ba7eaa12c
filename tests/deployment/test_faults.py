"""What may go wrong between machines, one row a test, with real processes: the run goes on with the rest, what came
back counts again, and the bits are those of an undisturbed run wherever nobody was left out."""

import signal
import time
from dataclasses import replace

import pytest
import torch

from fedsim.deployment import keys
from fedsim.deployment.client import work
from fedsim.deployment.federation import Patience
from fedsim.deployment.site import Site
from tests.conftest import DOMAINS
from tests.deployment.test_same_bits import simulated

pytestmark = pytest.mark.slow
FEDBN = {"strategy": "fedbn"}


def undisturbed(deployment, dataset) -> str:
    return simulated(dataset, deployment.config, deployment.folder / "simulated")["state_sha256"]


def test_a_client_killed_mid_round_is_left_out_and_the_run_goes_on(deploy):
    deployment = deploy(algorithm=FEDBN)
    server, clients = deployment.server(), deployment.clients()
    clients[2].until("round 2: train")
    clients[2].kill()
    assert server.wait() == 0, server.text()
    rejected = [e for e in deployment.events() if e["event"] == "rejected"]
    assert {e["client"] for e in rejected} == {2}
    assert "gone" in rejected[0]["reason"]


def test_a_client_that_restarts_mid_round_gets_its_order_again(deploy, dataset):
    deployment = deploy(algorithm=FEDBN)
    server, clients = deployment.server(), deployment.clients()
    clients[1].until("round 2: train")
    clients[1].kill()
    deployment.client(DOMAINS[1])
    assert server.wait() == 0, server.text()
    assert deployment.summary()["state_sha256"] == undisturbed(deployment, dataset)


def test_a_client_that_hangs_is_given_up_after_the_time_limit(deploy):
    class Hangs(Site):
        def train(self, job, order):
            time.sleep(1000)
            raise AssertionError("unreachable")

    deployment = deploy(Patience(silent=20, order=10, absent=60), rounds=1)
    server = deployment.server()
    for domain in DOMAINS[:2]:
        deployment.client(domain)
    hanging = lambda: work(  # noqa: E731
        f"127.0.0.1:{deployment.port}",
        deployment.pki / "ca.crt",
        keys.read_key(deployment.pki / "scan.key"),
        Hangs("scan", str(deployment.dataset.folder), None),
        give_up=60,
    )
    deployment._start("scan", hanging)
    assert server.wait() == 0, server.text()
    (rejected,) = [e for e in deployment.events() if e["event"] == "rejected"]
    assert (rejected["client"], rejected["reason"]) == (2, "no answer within 10 s")


def test_all_clients_gone_and_back(deploy, dataset):
    deployment = deploy(algorithm=FEDBN)
    server, clients = deployment.server(), deployment.clients()
    server.until("3 of 3 clients")  # before any of them can have answered the first order
    for client in clients:
        client.kill()
    server.until("all clients are gone")
    deployment.clients()
    assert server.wait() == 0, server.text()
    assert deployment.summary()["state_sha256"] == undisturbed(deployment, dataset)


@pytest.mark.parametrize("moment", ["round 1: train", "round 2: train", "round 3: train"])
def test_the_server_killed_and_resumed_ends_with_the_undisturbed_bits(deploy, dataset, moment):
    deployment = deploy(algorithm=FEDBN)
    server, clients = deployment.server(), deployment.clients()
    clients[0].until(moment)
    server.kill(signal.SIGKILL)
    again = deployment.server()
    assert again.wait() == 0, again.text()
    assert [c.wait() for c in clients] == [0, 0, 0]
    assert deployment.summary()["state_sha256"] == undisturbed(deployment, dataset)


def spoil(tensors, value):
    name = next(n for n, v in tensors.items() if v.dtype.is_floating_point)
    return {**tensors, name: value(tensors[name])}


MALFORMED = [
    lambda r: replace(r, shared=spoil(r.shared, lambda v: v * float("nan"))),
    lambda r: replace(r, shared=spoil(r.shared, lambda v: v + float("inf"))),
    lambda r: replace(r, shared=spoil(r.shared, lambda v: torch.ones(1))),
    lambda r: replace(r, shared=spoil(r.shared, lambda v: v.double())),
    lambda r: replace(r, shared=spoil(r.shared, lambda v: v.long())),
    lambda r: replace(r, shared=spoil(r.shared, lambda v: v.to(torch.complex64))),
    lambda r: replace(r, shared=dict(list(r.shared.items())[1:])),
    lambda r: replace(r, shared={**r.shared, "more": torch.ones(1)}),
    lambda r: replace(r, examples=-5),
    lambda r: replace(r, examples=0),
    lambda r: replace(r, examples=10**6),
    lambda r: replace(r, examples=float("nan")),
    lambda r: replace(r, metrics={**r.metrics, "loss": float("nan")}),
    lambda r: replace(r, metrics={}),
    lambda r: replace(r, report={"x": torch.tensor(float("nan"))}),
]


def test_malformed_updates_are_left_out_by_name(deploy):
    class Hostile(Site):
        def train(self, job, order):
            reply, dropped = super().train(job, order)
            return MALFORMED[order.round - 1](reply), dropped

    deployment = deploy(rounds=len(MALFORMED))
    server = deployment.server()
    for domain in DOMAINS[:2]:
        deployment.client(domain)
    hostile = lambda: work(  # noqa: E731
        f"127.0.0.1:{deployment.port}",
        deployment.pki / "ca.crt",
        keys.read_key(deployment.pki / "scan.key"),
        Hostile("scan", str(deployment.dataset.folder), None),
        give_up=60,
    )
    deployment._start("scan", hostile)
    assert server.wait() == 0, server.text()
    rejected = [(e["round"], e["client"]) for e in deployment.events() if e["event"] == "rejected"]
    assert rejected == [(round, 2) for round in range(1, len(MALFORMED) + 1)]
