"""Malformed updates of nineteen kinds under every strategy, a kind a round: each is refused by name and reason, the
run ends well, and after every round the state has the bits of the run that went without that client.

By Flower messages, as real clients send them, and at the worker's end, where blocks are folded.
"""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord

from fedsim.checkpoint import state_sha256
from fedsim.flower import CONFIG, METRICS, PARTIAL, SHARED
from fedsim.grid import SimulationGrid
from fedsim.guard import Policy
from fedsim.registry import presets
from fedsim.types import Tensors
from fedsim.wire import to_arrays, to_tensors
from tests.conftest import Small, shards_of
from tests.hostile import floats, scaled, tamper

STRATEGIES = [name for name in presets() if name != "centralised"]
FAST = ("fedbn", "scaffold")  # private tensors; reports of the model's size
slow_but = lambda names: [s if s in names else pytest.param(s, marks=pytest.mark.slow) for s in STRATEGIES]  # noqa: E731
CLIENTS, HOSTILE, SHARD = 5, 1, 6


def first(change):
    """Change the first floating-point tensor of an update."""

    def spoil(shared: Tensors) -> Tensors:
        name = floats(shared)[0]
        return {**shared, name: change(shared[name])}

    return spoil


def put(value: float):
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return change


TENSORS = {
    "NaN": (first(put(float("nan"))), "not finite"),
    "Inf": (first(put(float("-inf"))), "not finite"),
    "shape": (first(lambda v: v[..., :1]), "has shape"),
    "float64": (first(lambda v: v.double()), "is torch.float64, expected torch.float32"),
    "int64": (first(lambda v: v.long()), "is torch.int64, expected torch.float32"),
    "complex": (first(lambda v: v.to(torch.complex64)), "is torch.complex64, expected torch.float32"),
    "missing key": (lambda shared: dict(list(shared.items())[1:]), "is missing"),
    "extra key": (lambda shared: {**shared, "more": torch.ones(1)}, "'more' is not part of the model"),
}


def tensors(spoil):
    def change(content):
        content[SHARED] = to_arrays(spoil(to_tensors(content[SHARED])))

    return change


def metric(name: str, value):
    def change(content):
        content[METRICS] = MetricRecord({**content[METRICS], name: value})

    return change


def strings(content):
    content[SHARED] = ArrayRecord({**content[SHARED], "more": Array("<U3", (2,), "numpy.ndarray", b"junk")})


def no_metrics(content):
    del content[METRICS]


def metrics_of_the_wrong_kind(content):
    content[METRICS] = ConfigRecord({"num-examples": "ten", "order": 0, "client": HOSTILE})


def sum_of_a_block(content):
    """Were it believed, it would stand for all the clients."""
    content[PARTIAL] = to_arrays({n: v.double() for n, v in to_tensors(content[SHARED]).items()})
    content[CONFIG] = ConfigRecord({"weight": 1e9})


def nothing(content):
    content[SHARED] = ArrayRecord()


MALFORMED = {
    **{kind: (tensors(spoil), reason) for kind, (spoil, reason) in TENSORS.items()},
    "sum of a block": (sum_of_a_block, "a block's sum, expected one client's update"),
    "nothing": (nothing, "is missing"),
    "strings": (strings, "not a reply"),
    "examples negative": (metric("num-examples", -5), "example count is -5, expected at least 1"),
    "examples zero": (metric("num-examples", 0), "example count is 0, expected at least 1"),
    "examples NaN": (metric("num-examples", float("nan")), "example count is nan, expected a whole number"),
    "examples infinite": (metric("num-examples", float("inf")), "example count is inf, expected a whole number"),
    "more examples than any shard": (metric("num-examples", SHARD + 1), f"the shard holds {SHARD}"),
    "loss NaN": (metric("loss", float("nan")), "metric 'loss' is nan"),
    "no metrics": (no_metrics, "not a reply"),
    "metrics of the wrong kind": (metrics_of_the_wrong_kind, "example count is 'ten', expected a whole number"),
}


class Single(SimulationGrid):
    """Every client replies for itself, as over a network; ``edit(round, content)`` is done to the hostile one's
    content, or its reply gets lost."""

    folds = False

    def __init__(self, federation, edit=None):
        super().__init__(federation)
        self.edit = edit

    def _order(self, content):
        order, number = super()._order(content)
        return replace(order, fold=False), number

    def _train(self, group):
        round = int(group[0].content["fedsim"]["server-round"])
        replies = super()._train(group)
        for i, reply in enumerate(replies):
            if reply.metadata.src_node_id == HOSTILE + 1 and round > 0:
                assert not reply.has_error()
                if self.edit:
                    self.edit(round, reply.content)
                else:
                    replies[i] = Message(Error(2, "lost"), reply_to=group[HOSTILE])
        return replies


def five(dataset):
    """Five clients of six examples."""
    base = shards_of(dataset)
    starts = [dataset.slice(dataset.domains[i % 3], "train")[i // 3 * 8 :][:SHARD] for i in range(CLIENTS)]
    offsets = np.arange(CLIENTS + 1, dtype=np.int64) * SHARD
    return type(base)(np.concatenate(starts), offsets, (np.arange(CLIENTS) % 3).astype(np.int16), base.domains)


def small(dataset, strategy: str) -> Small:
    algorithm: dict = {"strategy": strategy}
    if strategy in ("krum", "multi-krum", "bulyan"):
        algorithm["byzantine"] = 0  # four of five are left
    if strategy == "fedtiny":
        algorithm |= {"candidates": 2, "dev-fraction": 1.0, "dev-passes": 1}
    public = {"federation": {"public-per-class": 1}}
    made = Small(dataset, five(dataset), algorithm=algorithm, training={"lr": 0.01}, **public)
    made.strategy.policy = Policy(max_examples=SHARD)
    return made


def by_messages(dataset, strategy: str, rounds: int, edit=None) -> list[str]:
    """The state's checksum after each round."""
    made = small(dataset, strategy)
    made.strategy.configure_evaluate = lambda *_: []  # takes half of the time
    grid, hashes = Single(made.federation, edit), []

    def record(round, arrays):
        if round > 0:
            hashes.append(state_sha256(made.strategy.state))

    made.strategy.start(grid, grid.initial_arrays(), num_rounds=rounds, evaluate_fn=record)
    return hashes


def kinds_for(dataset, strategy: str, kinds: dict) -> dict:
    shares = bool(set(small(dataset, strategy).task.trainable) - small(dataset, strategy).task.private)
    needs_tensors = {*TENSORS, "nothing"} - {"extra key"}
    return {k: v for k, v in kinds.items() if shares or k not in needs_tensors}


@pytest.mark.parametrize("strategy", slow_but(FAST))
def test_every_malformed_message_is_refused_by_name_and_costs_the_others_nothing(dataset, strategy, caplog):
    kinds = kinds_for(dataset, strategy, MALFORMED)
    edits = [change for change, _ in kinds.values()]
    with caplog.at_level(logging.WARNING, "fedsim"):
        found = by_messages(dataset, strategy, len(kinds), lambda round, content: edits[round - 1](content))
    refused = [r.getMessage() for r in caplog.records if "update rejected" in r.getMessage()]
    assert len(refused) == len(kinds)
    for message, (_, reason) in zip(refused, kinds.values()):
        assert message.startswith(f"node {HOSTILE + 1}: update rejected: ")
        assert reason in message
    assert found == by_messages(dataset, strategy, len(kinds))
    if strategy not in ("local-only", "krum"):  # no state on the server; the update of one client, perhaps another
        assert found != by_messages(dataset, strategy, len(kinds), lambda round, content: None)


AT_THE_WORKER = {
    **{kind: (lambda o, s=spoil: replace(o, shared=s(o.shared)), reason) for kind, (spoil, reason) in TENSORS.items()},
    "loss NaN": (lambda o: replace(o, loss=float("nan")), "the training loss is nan"),
    "report NaN": (lambda o: replace(o, report={"x": torch.tensor(float("nan"))}), "report 'x' holds a value"),
}


def by_blocks(dataset, strategy: str, kinds: dict) -> tuple[list[str], list[list]]:
    """(the state's checksum after each round, failures of each round)."""
    made = small(dataset, strategy)
    made.federation.pool.worker.spec = replace(made.spec, debug=False)
    state, hashes, failures = made.strategy.init(made.federation.shared), [], []
    for round in range(1 - made.strategy.setup_rounds, len(kinds) + 1):
        for order in made.strategy.orders(round, state):
            replies = made.federation.train(order, range(CLIENTS))
            state = made.strategy.aggregate(round, state, order, replies)
        if round > 0:
            hashes.append(state_sha256(state))
            failures.append(list(made.federation.failures))
    return hashes, failures


@pytest.mark.parametrize("strategy", slow_but(FAST))
def test_every_malformed_outcome_is_refused_by_the_worker(dataset, strategy, monkeypatch):
    kinds = kinds_for(dataset, strategy, AT_THE_WORKER)
    changes = [change for change, _ in kinds.values()]
    with monkeypatch.context() as patch:
        tamper(patch, HOSTILE, lambda order, o: changes[order.round - 1](o) if order.round > 0 else o)
        found, failures = by_blocks(dataset, strategy, kinds)
    for (failure,), (_, reason) in zip(failures, kinds.values()):
        assert (failure.client, failure.stage) == (HOSTILE, "update")
        assert reason in failure.reason

    def breaks(order, outcome):
        if order.round > 0:
            raise OSError("no power")
        return outcome

    with monkeypatch.context() as patch:
        tamper(patch, HOSTILE, breaks)
        expected, failures = by_blocks(dataset, strategy, kinds)
    assert all((f.stage, f.reason) == ("train", "OSError: no power") for (f,) in failures)
    assert found == expected


EVALUATIONS = {
    "examples infinite": metric("num-examples", float("inf")),
    "no examples": metric("num-examples", 0),
    "accuracy NaN": metric("accuracy", float("nan")),
    "a loss of the wrong kind": metric("loss", [1.0, 2.0]),
    "no metrics": no_metrics,
    "metrics of the wrong kind": metrics_of_the_wrong_kind,
}


@pytest.mark.parametrize("kind", EVALUATIONS)
def test_a_malformed_evaluation_is_left_out_by_name(dataset, caplog, kind):
    made = small(dataset, "fedbn")
    scores = {}
    for hostile in (None, EVALUATIONS[kind]):

        class Evaluating(SimulationGrid):
            def _evaluate(self, group, edit=hostile):
                replies = super()._evaluate(group)
                if edit:
                    edit(replies[HOSTILE].content)
                    return replies
                return [r for r in replies if r.metadata.src_node_id != HOSTILE + 1]

        grid = Evaluating(made.federation)
        made.strategy.state = dict(made.federation.shared)
        messages = made.strategy.configure_evaluate(1, grid.initial_arrays(), ConfigRecord(), grid)
        scores[hostile] = made.strategy.aggregate_evaluate(1, grid.send_and_receive(messages))
    assert scores[None] == scores[EVALUATIONS[kind]]
    assert f"node {HOSTILE + 1}: evaluation rejected: " in caplog.text


def test_the_policy_holds_for_messages_too(dataset, caplog):
    def run(policy: Policy, edit) -> tuple[list[str], list[int], str]:
        """(state's checksum after each of four rounds, clients asked in each, the log)."""
        made = small(dataset, "fedavg")
        made.strategy.policy = policy
        asked, hashes = [], []

        class Counting(Single):
            def _train(self, group):
                asked.append(len(group))
                return super()._train(group)

        grid = Counting(made.federation, edit)
        record = lambda round, arrays: hashes.append(state_sha256(made.strategy.state)) if round else None  # noqa: E731
        caplog.clear()
        with caplog.at_level(logging.WARNING, "fedsim"):
            made.strategy.start(grid, grid.initial_arrays(), num_rounds=4, evaluate_fn=record)
        return hashes, asked, caplog.text

    far_away = lambda round, content: tensors(scaled(1e3))(content)  # noqa: E731
    without, asked, _ = run(Policy(), None)
    assert asked == [5, 5, 5, 5]
    bounded, _, log = run(Policy(max_update_norm=20.0), far_away)
    assert bounded == without
    assert log.count("the bound is 20") == 4
    aside, asked, log = run(Policy(max_update_norm=20.0, set_aside_after=2), far_away)
    assert aside == without
    assert asked == [5, 5, 4, 4]
    assert log.count(f"node {HOSTILE + 1} is set aside after 2 refused rounds") == 1
    void, _, log = run(Policy(max_update_norm=20.0, quorum=1.0), far_away)
    assert set(void) == {state_sha256(small(dataset, "fedavg").federation.shared)}
    assert log.count("4 of 5 updates can be used, the quorum is 1; the model stays as it is") == 4
