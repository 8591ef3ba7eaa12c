"""What is decided before and beside the rounds: whether a run is continued, and what a node trains by."""

import pytest

from fedsim.app import _threads
from fedsim.build import plan
from fedsim.deployment.server import _same, deployed
from tests.conftest import shards_of, small_config
from tests.deployment.conftest import settings


def test_a_run_is_continued_with_what_was_chosen_for_it(dataset):
    asked = deployed(settings(simulation={"block": 0}))
    kept = plan(asked, (dataset, shards_of(dataset), None)).config
    assert (kept.simulation.block, kept.simulation.odd_block_threads) == (1, 1)
    assert _same(kept, asked)
    assert not _same(kept, deployed(settings(simulation={"block": 2})))
    assert not _same(kept, deployed(settings(simulation={"odd-block-threads": 2})))
    assert not _same(kept, deployed(settings(rounds=7)))


@pytest.mark.parametrize(
    ("block", "participation", "expected"),
    [(1, 1.0, [1, 1, 2]), (2, 1.0, [1, 1, 1]), (3, 1.0, [2] * 3), (1, 0.4, [1] * 3)],
)
def test_a_node_of_flowers_has_the_simulations_threads(dataset, block, participation, expected):
    config = small_config(
        federation={"participation": participation}, simulation={"block": block, "odd-block-threads": 2}
    )
    planned = plan(config, (dataset, shards_of(dataset), None))
    assert [_threads(planned, client) for client in range(3)] == expected
