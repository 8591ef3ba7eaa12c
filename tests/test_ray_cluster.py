"""Several nodes and fractions of GPUs through Ray's own placement: two nodes on this machine, GPUs in name only."""

from collections import Counter

import pytest
import ray
from ray.cluster_utils import Cluster

from fedsim.checkpoint import state_sha256
from fedsim.errors import ConfigError
from fedsim.ray_pool import RayPool
from tests.conftest import Small, nine

pytestmark = pytest.mark.slow


@pytest.fixture
def two_nodes():
    """Of two CPUs and one GPU each."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 1})
    cluster.add_node(num_cpus=2, num_gpus=1)
    cluster.wait_for_nodes()
    yield cluster.address
    ray.shutdown()
    cluster.shutdown()


def test_workers_on_two_nodes_with_half_a_gpu_each_end_with_the_same_bits(dataset, two_nodes):
    expected = state_sha256(Small(dataset).run(2))
    small = Small(dataset, pool=lambda spec: RayPool(spec, 4, gpus=0.5, address=two_nodes))
    assert state_sha256(small.run(2)) == expected
    nodes = Counter(node for node, _ in ray.get([a.where.remote() for a in small.federation.pool.workers.actors]))
    assert sorted(nodes.values()) == [2, 2], "one GPU serves two workers"
    small.federation.close()


def test_the_sums_of_a_large_model_are_added_on_two_nodes_with_the_same_bits(dataset, two_nodes, monkeypatch):
    monkeypatch.setattr("fedsim.ray_sums.MANY", 4)
    monkeypatch.setattr("fedsim.fold.LARGE", 0)
    monkeypatch.setattr("fedsim.fold.FAN", 2)
    expected = state_sha256(nine(dataset).run(2))
    small = nine(dataset, pool=lambda spec: RayPool(spec, 4, address=two_nodes))
    assert state_sha256(small.run(2)) == expected
    pool = small.federation.pool
    assert pool.adders.actors.keys() <= {(node, 0) for node, _ in pool.workers.processes}
    small.federation.close()


def test_more_gpus_than_the_cluster_has_are_refused(dataset, two_nodes):
    with pytest.raises(ConfigError, match="need 4 CPUs and 4 GPUs; Ray found 4 and 2"):
        RayPool(Small(dataset).spec, 4, gpus=1, address=two_nodes)
