"""What may go wrong between machines, one row a test, with real processes: the run goes on with the rest, what came
back counts again, and the bits are those of an undisturbed run wherever nobody was left out."""

import signal
import tempfile
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord

from fedsim.deployment import client as module
from fedsim.deployment import keys
from fedsim.deployment.client import work
from fedsim.deployment.federation import Patience
from fedsim.deployment.site import Site
from fedsim.flower import SHARED
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
def test_the_server_killed_and_resumed_ends_with_the_undisturbed_bits(deploy, dataset, moment, tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    deployment = deploy(algorithm=FEDBN)
    server, clients = deployment.server(), deployment.clients()
    clients[0].until(moment)
    server.kill(signal.SIGKILL)
    assert not list(temporary.glob("fedsim-*"))
    again = deployment.server()
    assert again.wait() == 0, again.text()
    assert [c.wait() for c in clients] == [0, 0, 0]
    assert deployment.summary()["state_sha256"] == undisturbed(deployment, dataset)


def spoil(tensors, value):
    name = next(n for n, v in tensors.items() if v.dtype.is_floating_point)
    return {**tensors, name: value(tensors[name])}


def shared(value):
    return lambda r: replace(r, shared=spoil(r.shared, value))


# The fifteen kinds of specs/flower.md, then what our own messages have beside them. Right: what the reason says.
MALFORMED = {
    "NaN": (shared(lambda v: v * float("nan")), "not finite"),
    "infinite": (shared(lambda v: v + float("inf")), "not finite"),
    "shape (1,)": (shared(lambda v: torch.ones(1)), "has shape (1,)"),
    "float64": (shared(lambda v: v.double()), "torch.float64"),
    "int64": (shared(lambda v: v.long()), "torch.int64"),
    "count negative": (lambda r: replace(r, examples=-5), "example count is -5"),
    "count NaN": (lambda r: replace(r, examples=float("nan")), "example count is nan"),
    "count infinite": (lambda r: replace(r, examples=float("inf")), "example count is inf"),
    "count 1e18": (lambda r: replace(r, examples=10**18), "the shard holds"),
    "count 0": (lambda r: replace(r, examples=0), "expected at least 1"),
    "wrong shape": (shared(torch.flatten), "has shape"),
    "string": (None, "not a reply"),
    "complex": (shared(lambda v: v.to(torch.complex64)), "torch.complex64"),
    "missing key": (lambda r: replace(r, shared=dict(list(r.shared.items())[1:])), "is missing"),
    "extra key": (lambda r: replace(r, shared={**r.shared, "more": torch.ones(1)}), "not part of the model"),
    "metric NaN": (lambda r: replace(r, metrics={**r.metrics, "loss": float("nan")}), "metric 'loss' is nan"),
    "no metrics": (lambda r: replace(r, metrics={}), "metrics are missing"),
    "report NaN": (lambda r: replace(r, report={"x": torch.tensor(float("nan"))}), "report 'x'"),
}


def test_malformed_updates_are_left_out_by_name(deploy):
    kinds = list(MALFORMED)

    class Hostile(Site):
        def train(self, job, order):
            reply, dropped = super().train(job, order)
            self.kind = kinds[order.round - 1]
            return (MALFORMED[self.kind][0] or (lambda r: r))(reply), dropped

    deployment = deploy(rounds=len(kinds))
    server = deployment.server()
    for domain in DOMAINS[:2]:
        deployment.client(domain)

    def hostile() -> None:
        site = Hostile("scan", str(deployment.dataset.folder), None)
        honest = module.reply_content

        def reply_content(*given):
            content = honest(*given)
            if site.kind == "string":  # torch has none
                record = content[SHARED]
                content[SHARED] = ArrayRecord({**record, next(iter(record)): Array(np.array(["text"]))})
            return content

        module.reply_content = reply_content
        secret = keys.read_key(deployment.pki / "scan.key")
        work(f"127.0.0.1:{deployment.port}", deployment.pki / "ca.crt", secret, site, give_up=60)

    deployment._start("scan", hostile)
    assert server.wait() == 0, server.text()
    rejected = [e for e in deployment.events() if e["event"] == "rejected"]
    assert [(e["round"], e["client"]) for e in rejected] == [(n, 2) for n in range(1, len(kinds) + 1)]
    for kind, event in zip(kinds, rejected):
        assert MALFORMED[kind][1] in event["reason"], (kind, event)
        assert f"round {event['round']}: client 2 left out: {event['reason'][:30]}" in server.text()
