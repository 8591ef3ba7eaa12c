"""Between our nouns and Flower's: Order and Reply as messages, and Flower's five strategy methods from our three.

Only the public app interface of Flower is used here (``flwr.app``, ``flwr.serverapp``), which is the same in later
versions; unstable names live in ``fedsim.grid`` and the deployment.
"""

from __future__ import annotations

from collections.abc import Iterable
from logging import getLogger
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy as FlowerStrategy

from fedsim.fold import Partial
from fedsim.guard import refuse, refuse_count, refuse_metrics
from fedsim.random import generator
from fedsim.types import Order, Reply, Tensors

if TYPE_CHECKING:
    from fedsim.strategy import Replies

log = getLogger("fedsim")
CONFIG, SHARED, EXTRA, REPORT, METRICS, PARTIAL = "fedsim", "shared", "extra", "report", "metrics", "partial"


def to_arrays(tensors: Tensors) -> ArrayRecord:
    return ArrayRecord({n: Array(v.detach().cpu().contiguous().numpy()) for n, v in tensors.items()})


def to_tensors(record: ArrayRecord) -> Tensors:
    return {n: torch.from_numpy(np.array(a.numpy())) for n, a in record.items()}


def order_content(order: Order, number: int = 0) -> RecordDict:
    """An order as the content of a Flower message; one content object serves all the clients of the order."""
    config: dict[str, Any] = {
        "server-round": order.round,
        "task": order.task,
        "fold": order.fold,
        "weighting": order.weighting,
        "order": number,
    }
    scalars = {f"scalar.{n}": float(v) for n, v in order.scalars.items()}
    return RecordDict(
        {
            SHARED: to_arrays(order.shared),
            EXTRA: to_arrays(order.extra),
            CONFIG: ConfigRecord({**config, **scalars}),
        }
    )


def read_order(content: RecordDict) -> Order:
    """The order in a message.

    Raises:
        KeyError: the message is no order of ours.
    """
    config: Any = content[CONFIG]
    prefix = "scalar."
    return Order(
        round=int(config["server-round"]),
        shared=to_tensors(content[SHARED]),  # type: ignore[arg-type]
        task=str(config["task"]),
        extra=to_tensors(content[EXTRA]),  # type: ignore[arg-type]
        scalars={k.removeprefix(prefix): float(v) for k, v in config.items() if k.startswith(prefix)},
        fold=bool(config["fold"]),
        weighting=str(config["weighting"]),
    )


def reply_content(reply: Reply, number: int, partial: Partial | None = None) -> RecordDict:
    """A client's reply; the first client of a folded block also carries the block's partial sums."""
    metrics: dict[str, int | float] = {"num-examples": reply.examples, "order": number, "client": reply.client}
    content = RecordDict(
        {
            SHARED: to_arrays(reply.shared),
            REPORT: to_arrays(reply.report),
            METRICS: MetricRecord({**metrics, **dict(reply.metrics)}),
        }
    )
    if partial is not None:
        content[PARTIAL] = to_arrays(partial.sums())
        content[CONFIG] = ConfigRecord({"weight": partial.weight})
    return content


def read_reply(content: RecordDict) -> tuple[Reply, int, Partial | None]:
    """(reply, number of the order, partial sums if it carries a block's)."""
    metrics: Any = dict(content[METRICS])  # type: ignore[arg-type]
    examples, number, client = metrics.pop("num-examples"), int(metrics.pop("order")), int(metrics.pop("client"))
    reply = Reply(client, examples, to_tensors(content[SHARED]), to_tensors(content[REPORT]), metrics)  # type: ignore[arg-type]
    if PARTIAL not in content:
        return reply, number, None
    weight = float(content[CONFIG]["weight"])  # type: ignore[index, arg-type]
    return reply, number, Partial(to_tensors(content[PARTIAL]), weight)  # type: ignore[arg-type]


class FlowerMethods(FlowerStrategy):
    """Flower's five methods, from ``init / orders / aggregate``."""

    init: Any
    orders: Any
    aggregate: Any
    shared: Any
    model: Any
    seed: int
    fraction_train: float

    def __init__(self) -> None:
        self.state: Tensors | None = None
        self._sent: list[Order] = []

    def summary(self) -> None:
        log.info("%s: fraction-train %g, seed %d", type(self).__name__, self.fraction_train, self.seed)

    def sample(self, server_round: int, grid: Grid) -> list[int]:
        """Nodes of a round, drawn by position in ascending order of node id, so that equal grids sample alike."""
        nodes = sorted(grid.get_node_ids())
        count = max(1, round(self.fraction_train * len(nodes)))
        draw = generator(self.seed, round=server_round, purpose="sample")
        return [nodes[i] for i in np.sort(draw.choice(len(nodes), count, replace=False))]

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        if self.state is None or server_round == 1:
            self.state = self.init(to_tensors(arrays))
        self._sent = self.orders(server_round, self.state)
        nodes = self.sample(server_round, grid)
        messages = []
        for number, order in enumerate(self._sent):
            content = order_content(order, number)
            for node in nodes:
                messages.append(Message(content, dst_node_id=node, message_type="train", group_id=str(server_round)))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        assert self.state is not None, "configure_train comes first"
        losses: list[tuple[float, int]] = []
        for number, believed in enumerate(collect(replies, self._sent)):
            if not believed.singles:
                log.warning("round %d: no reply to order %d can be used; the model stays", server_round, number)
                continue
            self.state = self.aggregate(server_round, self.state, self._sent[number], believed)
            losses += [(r.metrics.get("loss", 0.0), r.examples) for r in believed.singles]
        if not losses:
            return None, None
        loss = sum(value * n for value, n in losses) / sum(n for _, n in losses)
        return to_arrays(self.shared(self.state)), MetricRecord({"loss": loss, "clients": len(losses)})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        assert self.state is not None, "configure_train comes first"
        content = order_content(Order(server_round, self.model(self.state), task="evaluate"))
        return [Message(content, dst_node_id=n, message_type="evaluate") for n in sorted(grid.get_node_ids())]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        sums = {"accuracy": 0.0, "loss": 0.0}
        examples = 0
        for message in replies:
            if message.has_error():
                continue
            metrics: Any = message.content[METRICS]
            count = int(metrics["num-examples"])
            examples += count
            for name in sums:
                sums[name] += float(metrics[name]) * count
        return MetricRecord({n: v / examples for n, v in sums.items()}) if examples else None


def collect(messages: Iterable[Message], orders: list[Order]) -> list[Replies]:
    """Sort replies by order and client, and leave out, by name, what the guard does not believe."""
    from fedsim.strategy import Replies

    singles: list[list[Reply]] = [[] for _ in orders]
    partials: list[dict[int, Partial]] = [{} for _ in orders]
    for message in messages:
        node = message.metadata.src_node_id
        if message.has_error():
            log.warning("node %d: %s", node, message.error.reason)
            continue
        try:
            reply, number, partial = read_reply(message.content)
            order = orders[number]
            expected = {} if partial is not None or (order.fold and not reply.shared) else order.shared
            reason = refuse(reply.shared, expected) or refuse_count(reply.examples)
            reason = reason or refuse_metrics(reply.metrics)
        except (KeyError, ValueError, TypeError, IndexError) as error:
            reason = f"not a reply: {type(error).__name__}: {error}"
        if reason is not None:
            log.warning("node %d: update rejected: %s", node, reason)
            continue
        singles[number].append(reply)
        if partial is not None:
            partials[number][reply.client] = partial
    by_client = lambda replies: sorted(replies, key=lambda r: r.client)  # noqa: E731
    return [
        Replies(by_client(s), [p for _, p in sorted(ps.items())], order.weighting)
        for s, ps, order in zip(singles, partials, orders)
    ]
