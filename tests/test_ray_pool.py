"""Ray actors: one that is killed is replaced, and its block repeated with the same bits."""

import os
import signal
from pathlib import Path

import pytest

from fedsim.checkpoint import state_sha256
from fedsim.errors import ConfigError
from fedsim.plugin import Plugin
from fedsim.types import Order
from tests.conftest import Small


class KillOnce(Plugin):
    """Kills the process it trains in, the first time or every time."""

    def __init__(self, marker: Path, always: bool = False):
        self.marker, self.always, self.parent = marker, always, os.getpid()

    def begin(self, model, order):
        if os.getpid() != self.parent and (self.always or not self.marker.exists()):
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def with_plugin(small: Small, plugin: Plugin) -> None:
    object.__setattr__(small.task, "plugins", (*small.task.plugins, plugin))


@pytest.fixture(scope="module")
def ray_session():
    from fedsim.ray_pool import session

    with session(2):
        yield


def pool_for(small: Small, retries: int = 2):
    from fedsim.ray_pool import RayPool

    small.federation.pool = RayPool(small.spec, 2, retries=retries)
    return small.federation.pool


def test_a_killed_worker_is_replaced_and_the_block_repeated(dataset, ray_session, tmp_path):
    expected = state_sha256(Small(dataset).run(1))
    small = Small(dataset)
    with_plugin(small, KillOnce(tmp_path / "killed"))
    pool = pool_for(small)
    assert state_sha256(small.run(1)) == expected
    assert small.federation.retried == 1
    pool.close()


def test_a_block_that_kills_every_worker_is_given_up(dataset, ray_session, tmp_path):
    small = Small(dataset)
    with_plugin(small, KillOnce(tmp_path / "killed", always=True))
    pool = pool_for(small, retries=1)
    assert not small.federation.train(Order(1, small.federation.shared), [0]).singles
    (failure,) = small.federation.failures
    assert (failure.client, failure.stage) == (0, "worker")
    assert "died 2 times" in failure.reason
    pool.close()


def test_more_than_the_machine_has_is_refused(dataset, ray_session):
    from fedsim.ray_pool import RayPool

    with pytest.raises(ConfigError, match="Ray found 2 and 0: lower workers"):
        RayPool(Small(dataset).spec, 2, gpus=0.5)
