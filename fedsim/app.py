"""The project as a Flower app: ``flwr run .`` in Flower's own simulation, or on a stock SuperLink with SuperNodes.

The run configuration is fedsim's configuration, flattened by Flower to dotted keys. A node is a client of the
federation: number ``partition-id`` of its node configuration. Its private state lives in Flower's ``Context.state``.
"""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedsim.build import Plan, plan
from fedsim.checkpoint import state_sha256
from fedsim.config import Algorithm, Config, kebab, parse_config
from fedsim.engine import blocks_and_threads
from fedsim.errors import ConfigError
from fedsim.flower import METRICS, log, read_order, reply_content
from fedsim.packing import Packed
from fedsim.registry import relevant_options
from fedsim.types import ClientState
from fedsim.wire import to_dense_arrays, to_tensors
from fedsim.worker import EvaluationJob, Worker

PRIVATE, MEMORY = "fedsim-private", "fedsim-memory"
CLIENT_FAILED = 2  # Flower's error code for an exception in the ClientApp

server = ServerApp()
client = ClientApp()


def config_of(run_config: Any) -> Config:
    """Nested tables from Flower's dotted keys.

    Flower lets a run override only keys that the app lists, so the app lists the options of every algorithm; those
    that the chosen one does not have are left out here.
    """
    values: dict[str, Any] = {}
    for key, value in run_config.items():
        *tables, leaf = key.split(".")
        target = values
        for table in tables:
            target = target.setdefault(table, {})
        target[leaf] = value
    algorithm = values.get("algorithm", {})
    wanted = relevant_options(Algorithm.model_validate(algorithm))
    fixed = {kebab(name) for name in Algorithm.model_fields}
    values["algorithm"] = {k: v for k, v in algorithm.items() if k in fixed | wanted}
    return parse_config(values, "run configuration")


@functools.lru_cache(maxsize=2)
def _plan(run_config: str) -> Plan:
    return plan(config_of(json.loads(run_config)))


@functools.lru_cache(maxsize=2)
def _worker(run_config: str) -> tuple[Plan, Worker]:
    """Data and model stay in memory between messages as long as Flower keeps the process."""
    planned = _plan(run_config)
    return planned, Worker(planned.spec)


def _key(context: Context) -> str:
    return json.dumps(dict(context.run_config), sort_keys=True)


@server.main()
def main(grid: Grid, context: Context) -> None:
    planned = _plan(_key(context))
    strategy, config = planned.strategy, planned.config
    if planned.modes:
        raise ConfigError("evaluation.modes: Flower's own rounds have none; use 'fedsim run' or 'fedsim server'")
    strategy.fraction_train, strategy.seed = planned.cohort / len(planned.shards), config.seed
    shared, _ = planned.task.initial()
    result = strategy.start(grid, to_dense_arrays(shared), num_rounds=config.rounds)
    for round, metrics in sorted(result.evaluate_metrics_clientapp.items()):
        log.info("round %d: %s", round, dict(metrics))
    assert strategy.state is not None, "start sets it"
    print(f"state_sha256 {state_sha256(strategy.state)}", flush=True)


def _client_number(context: Context, planned: Plan) -> int:
    number = int(context.node_config.get("partition-id", -1))
    if not 0 <= number < len(planned.shards):
        raise ValueError(f"partition-id {number}: expected 0 to {len(planned.shards) - 1}, one for each client")
    return number


def _state(context: Context, planned: Plan) -> ClientState:
    if PRIVATE not in context.state:
        return ClientState(planned.task.initial()[1], {})
    records = context.state.array_records
    return ClientState(to_tensors(records[PRIVATE]), to_tensors(records[MEMORY]))


def _threads(planned: Plan, client: int) -> int:
    """Of torch for a client's training, as in a simulation; of a sample of clients a node does not know the others."""
    simulation, clients = planned.config.simulation, range(len(planned.shards))
    if planned.cohort < len(clients):
        return 1
    blocks = blocks_and_threads(clients, simulation.block, simulation.odd_block_threads)
    return next(threads for block, threads in blocks if client in block)


@client.train()
def train(message: Message, context: Context) -> Message:
    planned, worker = _worker(_key(context))
    number = _client_number(context, planned)
    order = read_order(message.content)
    state = Packed.of(_state(context, planned))
    result = worker.train(replace(order, fold=False), [number], [state], _threads(planned, number))
    if result.failures:
        return Message(Error(CLIENT_FAILED, result.failures[0].reason), reply_to=message)
    for packed in result.states.values():
        client_state = packed.unpack()
        context.state[PRIVATE] = to_dense_arrays(client_state.private)
        context.state[MEMORY] = to_dense_arrays(client_state.memory)
    position = int(message.content["fedsim"]["order"])  # type: ignore[index, arg-type]
    return Message(reply_content(result.replies[0][0], position, order.masks), reply_to=message)


@client.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    planned, worker = _worker(_key(context))
    number = _client_number(context, planned)
    shared, dataset = to_tensors(_arrays(message)), planned.dataset
    domain = planned.shards.domains[max(int(planned.shards.domain[number]), 0)]
    private = Packed.of(ClientState(_state(context, planned).private))
    job = EvaluationJob(number, domain, "test", dataset.slice(domain, "test"), private)
    (score,) = worker.evaluate(shared, [job])
    metrics: dict[str, Any] = {
        "num-examples": score.examples,
        "accuracy": score.correct / score.examples,
        "loss": score.loss / score.examples,
    }
    content = RecordDict({METRICS: MetricRecord(metrics), "domain": ConfigRecord({"domain": domain})})
    return Message(content, reply_to=message)


def _arrays(message: Message) -> ArrayRecord:
    return message.content.array_records["shared"]
