"""A domain left out: in no shard, scored with the shared model and the mean of what the clients keep."""

import pytest
import torch

from fedsim.build import plan
from fedsim.config import parse_config
from fedsim.data import from_config
from fedsim.errors import ConfigError
from tests.conftest import DOMAINS, Small, shards_of


def config(**federation):
    return parse_config({"federation": {"dataset": "digits", "domains": "mnist,street", **federation}})


def test_no_shard_holds_the_domain_left_out():
    dataset, shards = from_config(config(**{"leave-out": "street"}))
    assert shards.domains == ("mnist",)
    assert set(dataset.domain_train[shards.indices]) == {dataset.domains.index("mnist")}


@pytest.mark.parametrize("name", ["nowhere", "synth"])
def test_a_domain_that_is_not_there_cannot_be_left_out(name):
    with pytest.raises(ConfigError, match="leave-out"):
        from_config(config(**{"leave-out": name}))


@pytest.mark.parametrize("strategy", ["fedavg", "fedbn"])
def test_a_newcomer_has_the_mean_of_what_the_trained_clients_keep(dataset, strategy):
    small = Small(dataset, shards_of(dataset, (40, 33)), algorithm={"strategy": strategy})
    federation = small.federation
    federation.unseen = DOMAINS[2]
    initial = federation.newcomer()
    assert all(torch.equal(initial[n], federation.private[n]) for n in federation.private)
    state = small.run(2)
    found = federation.newcomer()
    for name, value in found.items():
        both = torch.stack([federation.state(c).private[name].double() for c in (0, 1)])
        torch.testing.assert_close(value.double(), both.mean(0), rtol=1e-6, atol=1e-7)
    (score,) = federation.evaluate(state, "unseen")
    assert (score.client, score.domain, score.split, score.examples) == (-1, DOMAINS[2], "unseen", 20)


def test_batch_norm_on_batches_of_one_is_refused_with_the_reason():
    one = {"federation": {"dataset": "digits", "domains": "mnist"}, "training": {"batch-size": 1}}
    with pytest.raises(ConfigError, match="batch-size = 1: BatchNorm"):
        plan(parse_config(one))
    plan(parse_config({**one, "algorithm": {"strategy": "fedwon"}}))
