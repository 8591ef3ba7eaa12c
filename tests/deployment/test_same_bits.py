"""Simulated and deployed end with the same bits: real processes, TLS, node authentication, loopback."""

import pytest

from fedsim.build import federation_of, plan
from fedsim.data import partition
from fedsim.run import drive
from fedsim.rundir import RunWriter
from fedsim.store import ClientStore
from tests.conftest import DOMAINS


def simulated(dataset, config, folder) -> dict:
    shards = partition(dataset, DOMAINS, "iid", config.federation.clients_per_domain, config.seed)
    planned = plan(config, (dataset, shards, None))
    return drive(federation_of(planned, ClientStore()), planned, RunWriter(folder))


MODES = {"fedbn": "own,reestimated,adabn,test-batch,alpha-bn,unmix-tns", "scaffold": "global,reestimated"}


@pytest.mark.parametrize("strategy", ["fedbn", "fedhyper-g-cl", "fedtiny", "scaffold"])
def test_deployed_is_simulated(deploy, dataset, tmp_path, strategy):
    deployment = deploy(algorithm={"strategy": strategy}, evaluation={"modes": MODES.get(strategy, "")})
    server = deployment.server()
    clients = deployment.clients()
    assert server.wait() == 0, server.text()
    assert [c.wait() for c in clients] == [0, 0, 0]
    expected = simulated(dataset, deployment.config, tmp_path / "simulated")
    found = deployment.summary()
    for key in ("state_sha256", "accuracy", "examples_seen", "train_flops", "rejected_updates", "retried_clients"):
        assert found[key] == expected[key], key
    modes = MODES.get(strategy, "").split(",") if strategy in MODES else []
    assert list(found.get("modes", {"test": {}})["test"]) == modes
    assert found.get("modes") == expected.get("modes")
    assert found["bytes_down"] > expected["bytes_down"]  # the tensors, and what wraps them
    assert found["bytes_up"] > expected["bytes_up"]
