"""A Flower ``Grid`` whose nodes are the clients of a simulated federation.

Any Flower strategy runs on it. Node ids are client numbers plus one, so that sampling can be reproduced. A strategy of
ours asks for folding in its orders and gets each block's partial sums with the block's first client; a foreign strategy
gets one ordinary reply a client, with one ArrayRecord and one MetricRecord, as Flower promises.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fedsim.engine import Federation
from fedsim.flower import CONFIG, METRICS, read_order, reply_content
from fedsim.strategy import Rows
from fedsim.types import Order
from fedsim.wire import to_dense_arrays, to_tensors
from fedsim.worker import BlockResult

CLIENT_FAILED = 2  # Flower's error code for an exception in the ClientApp


class SimulationGrid(Grid):
    """Args: federation: its clients are the nodes 1, ..., K."""

    folds = True  # a reply may hold the sum of a block; over a network nobody may answer for others

    def __init__(self, federation: Federation):
        self.federation = federation
        self._dtypes = {name: value.dtype for name, value in federation.shared.items()}
        self._replies: dict[str, Message] = {}
        self._run: Any = None
        self._sent = 0
        # Outside a SuperLink nobody has said who this process is, and Flower's Message() asks.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1

    def initial_arrays(self) -> ArrayRecord:
        """The shared tensors of the federation's model: what a strategy starts from."""
        return to_dense_arrays(self.federation.shared)

    def set_run(self, run: Any) -> None:
        self._run = run

    @property
    def run(self) -> Any:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(range(1, len(self.federation) + 1))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        messages = list(messages)
        for message in messages:
            self._sent += 1
            message.metadata.__dict__["_message_id"] = f"{self._sent}"
        for reply in self._answer(messages):
            self._replies[reply.metadata.reply_to_message_id] = reply
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self._replies.pop(i) for i in list(message_ids) if i in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return self.pull_messages(self.push_messages(messages))

    def _answer(self, messages: list[Message]) -> list[Message]:
        replies: list[Message] = []
        # One content object is one order to many clients: it is read once.
        groups: dict[tuple[int, str], list[Message]] = {}
        for message in messages:
            groups.setdefault((self._same(message), message.metadata.message_type), []).append(message)
        for (_, kind), group in groups.items():
            replies += self._evaluate(group) if kind.startswith("evaluate") else self._train(group)
        return replies

    def _same(self, message: Message) -> int:
        records = message.content.array_records.values()
        return hash(tuple(id(r) for r in records))

    def _order(self, content: RecordDict) -> tuple[Order, int]:
        """(order, its number); a foreign strategy's message is an order to train that does not fold."""
        if CONFIG in content:
            return read_order(content), int(content[CONFIG]["order"])  # type: ignore[index, arg-type]
        arrays = next(iter(content.array_records.values()))
        config = next(iter(content.config_records.values()), ConfigRecord())
        # Flower's own aggregation returns counters as float64.
        shared = {n: v.to(self._dtypes[n]) for n, v in to_tensors(arrays).items() if n in self._dtypes}
        scalars = {n: float(v) for n, v in config.items() if n == "lr"}  # type: ignore[arg-type]
        round = int(config.get("server-round", 1))  # type: ignore[arg-type]
        return Order(round, shared, scalars=scalars, fold=False), -1

    def _train(self, group: list[Message]) -> list[Message]:
        by_client = {m.metadata.dst_node_id - 1: m for m in group}
        order, number = self._order(group[0].content)
        # What the clients keep private is not the server's to send, even if its first arrays held the whole model.
        kept = {n: v for n, v in order.shared.items() if n in self._dtypes}
        order = replace(order, shared=kept)
        out = []
        for result in self.federation.train_blocks(order, list(by_client)):
            out += [Message(c, reply_to=by_client[i]) for i, c in self._contents(result, order, number)]
            out += [Message(Error(CLIENT_FAILED, f.reason), reply_to=by_client[f.client]) for f in result.failures]
        return out

    def _contents(self, result: BlockResult, order: Order, number: int) -> list[tuple[int, RecordDict]]:
        replies = Rows(result.replies)
        if number >= 0:
            return [
                (r.client, reply_content(r, number, order.masks, result.partial if i == 0 else None))
                for i, r in enumerate(replies)
            ]
        return [
            (
                r.client,
                RecordDict(
                    {
                        "arrays": to_dense_arrays(r.shared),
                        "metrics": MetricRecord({"num-examples": r.examples, **dict(r.metrics)}),
                    }
                ),
            )
            for r in replies
        ]

    def _evaluate(self, group: list[Message]) -> list[Message]:
        order, _ = self._order(group[0].content)
        kept = {n: v for n, v in order.shared.items() if n in self._dtypes}
        scores = self.federation.evaluate(kept)
        by_key = {(s.client, s.domain): s for s in scores}
        out = []
        for message in group:
            client = message.metadata.dst_node_id - 1
            own = [by_key.get((client, d)) or by_key[(-1, d)] for d in self.federation.domains(client)]
            examples = sum(s.examples for s in own)
            metrics: dict[str, Any] = {
                "num-examples": examples,
                "accuracy": sum(s.correct for s in own) / examples,
                "loss": sum(s.loss for s in own) / examples,
            }
            content = RecordDict(
                {
                    METRICS: MetricRecord(metrics),
                    "domain": ConfigRecord({"domain": ",".join(s.domain for s in own)}),
                }
            )
            out.append(Message(content, reply_to=message))
        return out
