"""The digits recipe by the command line: a simulation, and four client processes with TLS and keys, end alike."""

import json
import sys
from pathlib import Path

import pytest

from fedsim import cli
from tests.deployment.conftest import Process, free_port

RECIPE = Path(__file__).parents[2] / "experiments" / "deploy_digits" / "fedbn.toml"
DOMAINS = ("mnist", "mnistm", "street", "utility")


@pytest.fixture
def fedsim(tmp_path):
    """Starts ``fedsim ...`` in a process of its own."""
    started = []

    def start(name: str, *arguments: object) -> Process:
        def call() -> None:
            sys.argv = ["fedsim", *map(str, arguments)]
            cli.main()

        started.append(Process(tmp_path / f"{name}.log", call))
        return started[-1]

    yield start
    for process in started:
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fedbn", "fedtiny", "fedhyper-g-cl"])
def test_the_digits_recipe_ends_with_the_same_bits_deployed_as_simulated(fedsim, tmp_path, strategy):
    changes = {"federation.domains": ",".join(DOMAINS), "algorithm.strategy": strategy}
    if strategy == "fedbn":  # one block of all clients, and an odd one
        changes |= {"simulation.block": 4, "simulation.odd-block-threads": 2, "simulation.executor": "loop"}
    recipe = [RECIPE, *(part for key, value in changes.items() for part in ("--set", f"{key}={value}"))]
    pki, known = tmp_path / "pki", tmp_path / "clients"

    def done(*arguments: object) -> None:
        process = fedsim("tool", *arguments)
        assert process.wait() == 0, process.text()

    done("keys", "ca", pki)
    done("keys", "server", pki, "--host", "127.0.0.1")
    for domain in DOMAINS:
        done("keys", "node", pki, domain)
        done("keys", "register", pki / f"{domain}.pub", "--clients-dir", known)
    done("run", *recipe, "--out", tmp_path / "simulated")

    address = f"127.0.0.1:{free_port()}"
    files = ["--cert", pki / "server.crt", "--key", pki / "server.key", "--ca", pki / "ca.crt"]
    server = fedsim(
        "server", "server", *recipe, "--listen", address, *files, "--clients-dir", known, "--out", tmp_path / "deployed"
    )
    own = ["--server", address, "--ca", pki / "ca.crt", "--data", "digits", "--give-up", "60"]
    clients = [
        fedsim(d, "client", *own, "--key", pki / f"{d}.key", "--domain", d, "--state", tmp_path / "state" / d)
        for d in DOMAINS
    ]
    assert server.wait() == 0, server.text()
    assert [client.wait() for client in clients] == [0] * 4, [client.text() for client in clients]
    simulated, deployed = (
        json.loads((tmp_path / run / "summary.json").read_text()) for run in ("simulated", "deployed")
    )
    assert deployed["rounds"] == 5
    assert deployed["state_sha256"] == simulated["state_sha256"]
    assert deployed["accuracy"] == simulated["accuracy"]
