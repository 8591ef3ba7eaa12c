"""The server is killed before every single step that outlives it or that its clients see, and started again: each time
the run ends with the bits of one that nobody disturbed."""

import itertools
import os
import signal
import sys

import pytest

from fedsim.deployment import keys
from fedsim.deployment import server as module
from fedsim.deployment.client import work
from fedsim.deployment.link import Link
from fedsim.deployment.server import serve
from fedsim.deployment.site import Site
from fedsim.results.store import MetricStore
from tests.conftest import DOMAINS
from tests.deployment.test_same_bits import simulated

pytestmark = pytest.mark.slow


def die_before(step: int, run: str) -> None:
    """SIGKILL to this process before its ``step``-th step: a file of the run made, synced, renamed or removed, figures
    committed, an order sent. What the step is goes into the log first."""
    count = itertools.count(1)

    def counted(name: str) -> None:
        if next(count) == step:
            print(f"killed before {name}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(owner, name):
        inner = getattr(owner, name)

        def watched(*given, **named):
            counted(f"{getattr(owner, '__name__', owner)}.{name}")
            return inner(*given, **named)

        setattr(owner, name, watched)

    for owner, name in ((os, "fsync"), (os, "replace"), (os, "unlink"), (MetricStore, "commit"), (Link, "send")):
        watch(owner, name)

    def audit(event: str, details: tuple) -> None:
        if event == "open" and str(details[0]).startswith(run) and details[1] and set(str(details[1])) & set("awx"):
            counted(f"open {details[0]}")

    sys.addaudithook(audit)


@pytest.fixture
def staying(deploy):
    """A federation whose clients wait for the next run after each."""
    deployment = deploy(rounds=2, algorithm={"strategy": "fedbn"})
    for domain in DOMAINS:

        def client(domain=domain) -> None:
            site = Site(domain, str(deployment.dataset.folder), deployment.folder / "state" / domain)
            secret = keys.read_key(deployment.pki / f"{domain}.key")
            work(f"127.0.0.1:{deployment.port}", deployment.pki / "ca.crt", secret, site, give_up=600, stay=True)

        deployment._start(domain, client)
    return deployment


def test_killed_before_any_step(staying, dataset):
    expected = simulated(dataset, staying.config, staying.folder / "simulated")["state_sha256"]
    files = {name: staying.pki / f"server.{end}" for name, end in (("cert", "crt"), ("key", "key"))}
    options = {"listen": f"127.0.0.1:{staying.port}", **files, "ca": staying.pki / "ca.crt", "clients": staying.known}
    steps = []
    for step in itertools.count(1):
        staying.out = staying.folder / f"run{step}"

        def mortal(step=step, out=staying.out) -> None:
            die_before(step, str(out))
            serve(staying.config, out, **options, patience=staying.patience)

        server = staying._start(f"server{step}", mortal)
        code = server.wait()
        if code != 0:
            assert code == -signal.SIGKILL, server.text()
            steps.append(server.text().splitlines()[-1])
            again = staying.server()
            assert again.wait() == 0, again.text()
        found = staying.summary()
        assert found["state_sha256"] == expected, server.text()
        assert (found["rejected_updates"], found["rounds"]) == (0, 2)
        if code == 0:
            break
    assert len(steps) > 20, steps
    assert {"Link.send", "MetricStore.commit", "os.fsync", "os.replace"} <= {s.split()[2] for s in steps}


def test_killed_before_it_said_goodbye_it_says_so_when_started_again(deploy, dataset):
    deployment = deploy(rounds=1)
    files = {name: deployment.pki / f"server.{end}" for name, end in (("cert", "crt"), ("key", "key"))}
    options = {"listen": f"127.0.0.1:{deployment.port}", **files, "ca": deployment.pki / "ca.crt"}
    options |= {"clients": deployment.known, "patience": deployment.patience}

    def speechless() -> None:
        module._dismiss = lambda roster, members: os.kill(os.getpid(), signal.SIGKILL)
        serve(deployment.config, deployment.out, **options)

    server, clients = deployment._start("speechless", speechless), deployment.clients()
    assert server.wait() == -signal.SIGKILL, server.text()
    summary = deployment.summary()
    again = deployment.server()
    assert again.wait() == 0, again.text()
    assert [c.wait() for c in clients] == [0, 0, 0]
    assert "the run is finished" in clients[0].text()

    def alone() -> None:
        module.FAREWELL = 1.0
        serve(deployment.config, deployment.out, **options)

    assert deployment._start("alone", alone).wait() == 0
    assert deployment.summary() == summary
