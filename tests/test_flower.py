"""Our strategies on Flower's own loop, foreign strategies on our Grid, and one malformed update of each kind."""

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from flwr.serverapp.strategy import FedMedian
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import strategies
from fedsim.checkpoint import state_sha256
from fedsim.errors import ConfigError
from fedsim.flower import collect, order_content, read_order, read_reply, reply_content
from fedsim.fold import fan_of
from fedsim.grid import SimulationGrid
from fedsim.types import Order, Reply
from fedsim.wire import to_dense_arrays, to_tensors
from strategies import FedAvg, FedOpt, Robust
from strategies.robust import Bulyan, Median
from tests.conftest import Small, nine_clients


@pytest.mark.parametrize("name", ["FedAvg", "FedBN", "FedWon"])
@pytest.mark.parametrize("block", [1, 2])
def test_flowers_start_ends_with_the_bits_of_the_simulator(dataset, name, block):
    sections = {"algorithm": {"strategy": name.lower()}, "simulation": {"block": block}}
    expected = Small(dataset, **sections).run(3)
    small = Small(dataset, **sections)
    strategy = getattr(strategies, name)()
    grid = SimulationGrid(small.federation)
    result = strategy.start(grid, grid.initial_arrays(), num_rounds=3)
    assert state_sha256(to_tensors(result.arrays)) == state_sha256(expected)
    assert 0 <= result.evaluate_metrics_clientapp[3]["accuracy"] <= 1


def test_fedbn_called_as_any_flower_user_would(dataset):
    """With the whole model's arrays: what is private is dropped at once and never held by the server."""
    small = Small(dataset, algorithm={"strategy": "fedbn"})
    whole = to_dense_arrays(small.task.model.state_dict())
    result = strategies.FedBN(fraction_train=0.67).start(SimulationGrid(small.federation), whole, num_rounds=2)
    assert small.task.private
    assert not small.task.private & result.arrays.keys()
    assert result.arrays.keys() == small.federation.shared.keys()


def test_what_is_private_has_no_part_in_how_sums_are_added(dataset, monkeypatch):
    """The first order of a run that starts with the whole model holds it, the clients' sums do not."""
    sections = {"algorithm": {"strategy": "fedbn"}, "training": {"dtype": "float64"}, "simulation": {"block": 1}}
    shards = nine_clients(dataset)
    small = Small(dataset, shards, **sections)
    whole = {n: v for n, v in small.task.model.state_dict().items() if n not in small.task.frozen}
    monkeypatch.setattr("fedsim.fold.LARGE", sum(v.nbytes for v in small.federation.shared.values()) + 1)
    monkeypatch.setattr("fedsim.fold.FAN", 2)
    assert (fan_of(small.federation.shared), fan_of(whole)) == (float("inf"), 2)
    result = strategies.FedBN().start(SimulationGrid(small.federation), to_dense_arrays(whole), num_rounds=1)
    assert state_sha256(to_tensors(result.arrays)) == state_sha256(Small(dataset, shards, **sections).run(1))


@pytest.mark.parametrize("strategy", [FlowerFedAvg, FedMedian])
def test_a_foreign_strategy_runs_on_our_grid(dataset, strategy):
    small = Small(dataset)
    foreign = strategy(fraction_train=1.0, fraction_evaluate=1.0, min_available_nodes=3)
    result = foreign.start(SimulationGrid(small.federation), to_dense_arrays(small.federation.shared), num_rounds=2)
    assert result.arrays.keys() == small.federation.shared.keys()
    assert result.train_metrics_clientapp[2]["loss"] < 5
    assert 0 <= result.evaluate_metrics_clientapp[2]["accuracy"] <= 1


def test_flowers_own_fedavg_computes_our_mean(dataset):
    ours = Small(dataset).run(1)
    small = Small(dataset)
    foreign = FlowerFedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_available_nodes=3)
    result = foreign.start(SimulationGrid(small.federation), to_dense_arrays(small.federation.shared), num_rounds=1)
    theirs = to_tensors(result.arrays)
    for name in small.task.trainable:
        torch.testing.assert_close(theirs[name], ours[name], rtol=1e-6, atol=1e-7)


def test_messages_are_the_identity():
    order = Order(3, {"w": torch.tensor([1.0, -0.0])}, "score", {"mask": torch.ones(2)}, {"lr": 0.1}, False, "uniform")
    again = read_order(order_content(order))
    assert (again.round, again.task, again.scalars, again.fold, again.weighting) == (
        3,
        "score",
        {"lr": 0.1},
        False,
        "uniform",
    )
    assert state_sha256(again.shared) == state_sha256(order.shared)
    assert torch.equal(again.extra["mask"], order.extra["mask"])
    reply = Reply(4, 17, {"w": torch.ones(2)}, {"beta": torch.tensor(0.5)}, {"loss": 1.25})
    found, number, partial = read_reply(reply_content(reply, 2), [order] * 3)
    assert (found.client, found.examples, number, partial, found.metrics) == (4, 17, 2, None, {"loss": 1.25})
    assert torch.equal(found.report["beta"], reply.report["beta"])


ORDER = Order(1, {"a": torch.zeros(2), "b": torch.zeros(3)})
GOOD = {"a": torch.ones(2), "b": torch.ones(3)}


def answer(node: int, shared=None, examples=10, **metrics) -> Message:
    sent = Message(RecordDict(), dst_node_id=node, message_type="train")
    content = reply_content(Reply(node, 1, GOOD if shared is None else shared, {}, {"loss": 1.0, **metrics}), 0)
    content["metrics"]["num-examples"] = examples
    return Message(content, reply_to=sent)


def raw(node: int, arrays: dict) -> Message:
    message = answer(node)
    message.content["shared"] = ArrayRecord(arrays)
    return message


def without(node: int, record: str) -> Message:
    message = answer(node)
    del message.content[record]
    return message


def wrong_kind(node: int) -> Message:
    message = answer(node)
    message.content["metrics"] = ConfigRecord({"num-examples": "ten", "order": 0, "client": node})
    return message


MALFORMED = {
    "NaN": lambda n: answer(n, {**GOOD, "a": torch.tensor([1.0, float("nan")])}),
    "Inf": lambda n: answer(n, {**GOOD, "a": torch.tensor([1.0, float("inf")])}),
    "shape": lambda n: answer(n, {**GOOD, "a": torch.ones(1)}),
    "float64": lambda n: answer(n, {**GOOD, "a": torch.ones(2).double()}),
    "int64": lambda n: answer(n, {**GOOD, "a": torch.ones(2).long()}),
    "missing key": lambda n: answer(n, {"a": GOOD["a"]}),
    "extra key": lambda n: answer(n, {**GOOD, "c": torch.ones(1)}),
    "strings": lambda n: raw(n, {"a": Array("<U3", (2,), "numpy.ndarray", b"junk"), "b": Array(GOOD["b"].numpy())}),
    "complex": lambda n: answer(n, {**GOOD, "a": torch.ones(2, dtype=torch.complex64)}),
    "examples negative": lambda n: answer(n, examples=-5),
    "examples NaN": lambda n: answer(n, examples=float("nan")),
    "examples inf": lambda n: answer(n, examples=float("inf")),
    "examples 0": lambda n: answer(n, examples=0),
    "loss NaN": lambda n: answer(n, loss=float("nan")),
    "no metrics": lambda n: without(n, "metrics"),
    "metrics of the wrong kind": wrong_kind,
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_update_is_left_out_and_the_others_count(dataset, kind, caplog):
    SimulationGrid(Small(dataset).federation)  # gives Flower the identity that Message() asks for
    messages = [answer(1), MALFORMED[kind](2), answer(3)]
    (believed,) = collect(messages, [ORDER])
    assert [r.client for r in believed.singles] == [1, 3]
    assert "node 2: update rejected" in caplog.text
    assert torch.equal(believed.mean(ORDER.shared)["a"], GOOD["a"])


RULES = {
    "mean": FedAvg,
    "adam": lambda: FedOpt("adam", eta=0.1),
    "median": lambda: Robust(FedAvg(), Median(1)),
    "bulyan": lambda: Robust(FedAvg(), Bulyan(0)),
}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.permutations(range(5)), st.integers(0, 2**31), st.sampled_from(sorted(RULES)))
def test_the_order_of_messages_changes_no_bit(dataset, order, seed, rule):
    SimulationGrid(Small(dataset).federation)  # gives Flower the identity that Message() asks for
    draw = torch.Generator().manual_seed(seed)
    random = [{n: torch.randn(v.shape, generator=draw) for n, v in GOOD.items()} for _ in range(5)]
    messages = [answer(node, shared, examples=node + 1) for node, shared in enumerate(random)]
    strategy = RULES[rule]()
    state = strategy.init(dict(ORDER.shared))
    (believed,), (shuffled,) = collect(messages, [ORDER]), collect([messages[i] for i in order], [ORDER])
    one, other = (strategy.aggregate(1, state, ORDER, r) for r in (believed, shuffled))
    assert state_sha256(one) == state_sha256(other)


class Recording(SimulationGrid):
    """Keeps what travels: names and bytes of every array, and the keys of every configuration."""

    def __init__(self, federation):
        super().__init__(federation)
        self.names, self.data = set(), []

    def _note(self, messages):
        for message in messages:
            for record in message.content.array_records.values():
                self.names |= set(record)
                self.data += [a.data for a in record.values()]
            for record in message.content.config_records.values():
                self.names |= set(record) | {n for v in record.values() if isinstance(v, list) for n in v}

    def _train(self, group):
        replies = super()._train(group)
        self._note([group[0], *(r for r in replies if r.has_content())])
        return replies


AXES = {
    "strategy": st.sampled_from(
        ["fedavg", "fedprox", "fedadam", "scaffold", "feddyn", "fednova", "ditto", "fedper", "fedrep"]
    ),
    "normalization": st.sampled_from(["shared", "local", "local-statistics", "fixed-statistics", "gn"]),
    "pruning": st.sampled_from(["none", "fedtiny", "prunefl", "feddst"]),
    "learning-rate": st.sampled_from(["constant", "fedhyper-g", "fedhyper-cl", "fedexp"]),
    "aggregation": st.sampled_from(["mean", "median", "norm-clipping"]),
}


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.fixed_dictionaries(AXES))
def test_what_is_private_is_in_no_message_neither_by_name_nor_by_value(dataset, algorithm):
    options = {"density": 0.2, "adjust-every": 1, "adjust-until": 4} if algorithm["pruning"] != "none" else {}
    try:
        small = Small(dataset, algorithm={**algorithm, **options})
    except ConfigError:
        assume(False)
    grid = Recording(small.federation)
    small.strategy.start(grid, grid.initial_arrays(), num_rounds=2)
    assert grid.data
    for name in small.task.private:
        assert not [n for n in grid.names if n == name or n.endswith(("." + name, "/" + name))], name
    travelled = b"|".join(grid.data)
    for client in range(3):
        for name, value in small.federation.state(client).private.items():
            if value.unique().numel() > 4:
                assert value.numpy().tobytes() not in travelled, name


def test_metric_records_stay_numeric():
    assert isinstance(reply_content(Reply(1, 2, {}, {}, {"loss": 0.5}), 0)["metrics"], MetricRecord)
