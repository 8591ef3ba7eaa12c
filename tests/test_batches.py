"""Batch plans: every example once an epoch, a function of (seed, round, client), stated policy for the last batch."""

import numpy as np
import pytest

from fedsim.batches import batch_plan

SHARD = np.arange(100, 143)  # 43 = 32 + 11


def test_an_epoch_holds_every_example_once():
    plan, dropped = batch_plan(SHARD, batch_size=32, epochs=2)
    assert [len(b) for b in plan] == [32, 11, 32, 11]
    assert sorted(np.concatenate(plan[:2])) == list(SHARD)
    assert dropped == 0
    assert not np.array_equal(plan[0], plan[2]), "a new order every epoch"


def test_drop_is_counted_but_never_empties_a_client():
    plan, dropped = batch_plan(SHARD, batch_size=32, epochs=2, last="drop")
    assert ([len(b) for b in plan], dropped) == ([32, 32], 22)
    plan, dropped = batch_plan(SHARD[:5], batch_size=32, last="drop")
    assert ([len(b) for b in plan], dropped) == ([5], 0)


def test_batchnorm_never_sees_a_batch_of_one():
    plan, dropped = batch_plan(SHARD[:33], batch_size=32, smallest=2)
    assert ([len(b) for b in plan], dropped) == ([32], 1)
    assert batch_plan(SHARD[:1], batch_size=32, smallest=2) == ([], 1)


def test_steps_run_over_epochs():
    plan, _ = batch_plan(SHARD, batch_size=32, steps=5)
    assert [len(b) for b in plan] == [32, 11, 32, 11, 32]


@pytest.mark.parametrize("change", [{"seed": 1}, {"round": 2}, {"client": 3}])
def test_depends_on_seed_round_and_client_alone(change):
    again = batch_plan(SHARD, batch_size=8)[0]
    assert all(map(np.array_equal, batch_plan(SHARD, batch_size=8)[0], again))
    assert not all(map(np.array_equal, batch_plan(SHARD, batch_size=8, **change)[0], again))
