"""The guard's policy between machines: refused and set aside is whom the simulation refuses and sets aside, and the
rest ends with its bits."""

from dataclasses import replace

import pytest

from fedsim.deployment import keys
from fedsim.deployment.client import work
from fedsim.deployment.site import Site
from tests.conftest import DOMAINS
from tests.deployment.test_same_bits import simulated
from tests.hostile import hand_over, scaled

pytestmark = pytest.mark.slow


def test_a_repeat_offender_is_set_aside_as_in_the_simulation(deploy, dataset, tmp_path, monkeypatch):
    class Hostile(Site):
        def train(self, job, order):
            reply, dropped = super().train(job, order)
            return replace(reply, shared=scaled(50.0)(reply.shared)), dropped

    guard = {"max-update-norm": 20.0, "set-aside-after": 2, "quorum": 0.5}
    deployment = deploy(rounds=4, guard=guard, algorithm={"strategy": "fedbn"})
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
    hand_over(monkeypatch, 2, scaled(50.0))
    expected, found = simulated(dataset, deployment.config, tmp_path / "simulated"), deployment.summary()
    assert found["set_aside"] == [2]
    assert found["refused_rounds"] == {"2": 2}
    for key in ("state_sha256", "rejected_updates", "left_out", "set_aside", "void_rounds"):
        assert found[key] == expected[key], key
