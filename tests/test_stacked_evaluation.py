"""Evaluation under vmap scores many clients' models at once: the loop's scores, whoever is scored together."""

import numpy as np
import pytest
import torch

from fedsim import worker as worker_module
from fedsim.data import Partition
from fedsim.vectorized import stacks_models
from tests.conftest import Small

CASES = [("fedper", "small-cnn"), ("fedrep", "small-cnn"), ("ditto", "logistic")]


def many(dataset, strategy: str, model: str, executor: str) -> Small:
    """Twelve clients, their domains in turns."""
    shards = [dataset.slice(d, "train")[i * 10 : i * 10 + 10] for i in range(4) for d in dataset.domains]
    domain = np.tile(np.arange(3, dtype=np.int16), 4)
    partition = Partition(np.concatenate(shards), np.arange(13, dtype=np.int64) * 10, domain, dataset.domains)
    norm = "none" if model == "logistic" else "bn"
    return Small(
        dataset,
        partition,
        algorithm={"strategy": strategy},
        model={"name": model, "norm": norm},
        simulation={"executor": executor},
        evaluation={"batch-size": 8},
    )


def width(private):
    return len(next(iter(private.values())))


@pytest.mark.parametrize(("strategy", "model"), CASES)
def test_the_scores_are_the_loops(dataset, strategy, model, monkeypatch):
    loop, stacked = (many(dataset, strategy, model, executor) for executor in ("loop", "vmap"))
    shared = stacked.run(2)
    for client in range(12):
        loop.federation.store.put(client, 1, stacked.federation.store.get(client))
    shared = stacked.strategy.model(shared)
    expected = loop.federation.evaluate(shared)
    called = []
    score = worker_module.score_stacked
    monkeypatch.setattr(worker_module, "score_stacked", lambda *a: called.append(width(a[2])) or score(*a))
    found = stacked.federation.evaluate(shared)
    assert called == [4, 4, 4]
    assert [(s.client, s.domain, s.examples) for s in found] == [(s.client, s.domain, s.examples) for s in expected]
    assert [s.correct for s in found] == [s.correct for s in expected]
    assert [s.loss for s in found] == pytest.approx([s.loss for s in expected], rel=1e-6)
    assert len({s.loss for s in found}) > 3, "the clients' models differ"


def test_what_does_not_fit_into_memory_at_once_is_scored_in_halves(dataset, monkeypatch):
    small = many(dataset, "fedper", "small-cnn", "vmap")
    small.run(1)
    expected = small.federation.evaluate(small.federation.shared)
    score, sizes = worker_module.score_stacked, []

    def one_at_most(task, shared, private, batches):
        sizes.append(width(private))
        if width(private) > 1:
            raise torch.OutOfMemoryError
        return score(task, shared, private, batches)

    monkeypatch.setattr(worker_module, "score_stacked", one_at_most)
    found = small.federation.evaluate(small.federation.shared)
    assert [s.client for s in found] == [s.client for s in expected]
    assert [s.loss for s in found] == pytest.approx([s.loss for s in expected], rel=1e-6)
    assert sizes[:4] == [4, 2, 1, 1]


def test_models_are_stacked_only_where_what_is_private_comes_after_the_convolutions(dataset):
    assert stacks_models(many(dataset, "fedper", "small-cnn", "vmap").task, "cpu")
    assert stacks_models(many(dataset, "ditto", "logistic", "vmap").task, "cpu")
    assert not stacks_models(many(dataset, "fedbn", "small-cnn", "vmap").task, "cpu")
    assert not stacks_models(many(dataset, "fedavg", "logistic", "vmap").task, "cpu")
