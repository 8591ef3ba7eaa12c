"""Batch plans: every example once an epoch, a function of (seed, round, client), stated policy for the last batch."""

import numpy as np
import pytest

from fedsim.batches import batch_plan

SHARD = np.arange(100, 143)[None]  # 43 = 32 + 11


def test_an_epoch_holds_every_example_once():
    plan = batch_plan(SHARD, batch_size=32, epochs=2)
    assert [b.shape[1] for b in plan] == [32, 11, 32, 11]
    assert sorted(np.concatenate([plan[0], plan[1]], 1)[0]) == list(SHARD[0])
    assert plan.layout.dropped == 0
    assert not np.array_equal(plan[0], plan[2]), "a new order every epoch"


def test_drop_is_counted_but_never_empties_a_client():
    plan = batch_plan(SHARD, batch_size=32, epochs=2, last="drop")
    assert ([b.shape[1] for b in plan], plan.layout.dropped) == ([32, 32], 22)
    plan = batch_plan(SHARD[:, :5], batch_size=32, last="drop")
    assert ([b.shape[1] for b in plan], plan.layout.dropped) == ([5], 0)


def test_batchnorm_never_sees_a_batch_of_one():
    plan = batch_plan(SHARD[:, :33], batch_size=32, smallest=2)
    assert ([b.shape[1] for b in plan], plan.layout.dropped) == ([32], 1)
    plan = batch_plan(SHARD[:, :1], batch_size=32, smallest=2)
    assert (len(plan), plan.layout.dropped) == (0, 1)


def test_steps_run_over_epochs():
    plan = batch_plan(SHARD, batch_size=32, steps=5)
    assert [b.shape[1] for b in plan] == [32, 11, 32, 11, 32]


@pytest.mark.parametrize("change", [{"seed": 1}, {"round": 2}, {"clients": [3]}])
def test_depends_on_seed_round_and_client_alone(change):
    order = batch_plan(SHARD, batch_size=8).order
    assert np.array_equal(batch_plan(SHARD, batch_size=8).order, order)
    assert not np.array_equal(batch_plan(SHARD, batch_size=8, **change).order, order)


def test_without_shuffling_every_epoch_is_the_shard():
    plan = batch_plan(SHARD, batch_size=32, epochs=2, shuffle=False)
    assert np.array_equal(np.concatenate(list(plan), 1), np.tile(SHARD, 2))


def test_clients_planned_together_see_what_each_sees_alone():
    together = batch_plan(np.stack([SHARD[0], SHARD[0] + 1000]), [4, 9], batch_size=8, epochs=2, round=3)
    alone = [batch_plan(SHARD + 1000 * i, [c], batch_size=8, epochs=2, round=3).order[0] for i, c in ((0, 4), (1, 9))]
    assert np.array_equal(together.order, np.stack(alone))
