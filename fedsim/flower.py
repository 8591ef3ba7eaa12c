"""Between our nouns and Flower's: Order and Reply as messages, and Flower's five strategy methods from our three.

Only the public app interface of Flower is used here (``flwr.app``, ``flwr.serverapp``), which is the same in later
versions; unstable names live in ``fedsim.grid`` and the deployment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from logging import getLogger
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy as FlowerStrategy

from fedsim.fold import Partial, Tree, fan_of
from fedsim.guard import (
    WELL_FORMED,
    Offenders,
    Policy,
    refuse,
    refuse_count,
    refuse_metrics,
    refuse_norm,
    refuse_odd,
    refuse_report,
)
from fedsim.random import generator
from fedsim.types import Order, Reply, Tensors
from fedsim.wire import to_arrays, to_dense_arrays, to_tensors, to_tensors_and_masks

if TYPE_CHECKING:
    from fedsim.strategy import Replies

log = getLogger("fedsim")
CONFIG, SHARED, EXTRA, REPORT, METRICS, PARTIAL = "fedsim", "shared", "extra", "report", "metrics", "partial"
BASE = "base."  # in CONFIG, before a name: how often the order's tensor has still to be added to a block's sum


def order_content(order: Order, number: int = 0) -> RecordDict:
    """An order as the content of a Flower message; one content object serves all the clients of the order."""
    config: dict[str, Any] = {
        "server-round": order.round,
        "task": order.task,
        "fold": order.fold,
        "weighting": order.weighting,
        "order": number,
    }
    if order.returns is not None:
        config["returns"] = list(order.returns)
    scalars = {f"scalar.{n}": float(v) for n, v in order.scalars.items()}
    return RecordDict(
        {
            SHARED: to_arrays(order.shared, order.masks),
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
    shared, masks = to_tensors_and_masks(content[SHARED])  # type: ignore[arg-type]
    return Order(
        round=int(config["server-round"]),
        shared=shared,
        task=str(config["task"]),
        extra=to_tensors(content[EXTRA]),  # type: ignore[arg-type]
        scalars={k.removeprefix(prefix): float(v) for k, v in config.items() if k.startswith(prefix)},
        fold=bool(config["fold"]),
        weighting=str(config["weighting"]),
        masks=masks,
        returns=tuple(config["returns"]) if "returns" in config else None,
    )


def reply_content(
    reply: Reply, number: int, masks: Tensors | None = None, partial: Partial | None = None
) -> RecordDict:
    """A client's reply to an order with these masks; the first client of a folded block also carries the block's
    partial sums."""
    masks = {n: m for n, m in (masks or {}).items() if n in reply.shared}
    metrics: dict[str, int | float] = {"num-examples": reply.examples, "order": number, "client": reply.client}
    content = RecordDict(
        {
            SHARED: to_arrays(reply.shared, masks),
            REPORT: to_dense_arrays(reply.report),
            METRICS: MetricRecord({**metrics, **dict(reply.metrics)}),
        }
    )
    if partial is not None:
        content[PARTIAL] = to_dense_arrays(partial.sums())
        base = {BASE + name: times for name, times in partial.base.items()}
        content[CONFIG] = ConfigRecord({"weight": partial.weight, **base})
    return content


def read_reply(content: RecordDict, orders: Sequence[Order]) -> tuple[Reply, int, Partial | None]:
    """(reply, number of the order it answers, partial sums if it carries a block's).

    Raises:
        KeyError, ValueError, TypeError, IndexError: the message is no reply to one of ``orders``.
    """
    metrics: Any = dict(content[METRICS])  # type: ignore[arg-type]
    examples, number, client = metrics.pop("num-examples"), int(metrics.pop("order")), int(metrics.pop("client"))
    if not 0 <= number < len(orders):
        raise IndexError(f"order {number}, there were {len(orders)}")
    shared = to_tensors(content[SHARED], orders[number].shared)  # type: ignore[arg-type]
    report = to_tensors(content[REPORT], {})  # type: ignore[arg-type]
    reply = Reply(client, examples, shared, report, metrics)
    if PARTIAL not in content:
        return reply, number, None
    config: dict[str, Any] = dict(content[CONFIG])  # type: ignore[arg-type]
    base = {name.removeprefix(BASE): float(times) for name, times in config.items() if name.startswith(BASE)}
    sums = to_tensors(content[PARTIAL])  # type: ignore[arg-type]
    return reply, number, Partial(sums, float(config["weight"]), base=base)


class FlowerMethods(FlowerStrategy):
    """Flower's five methods, from ``init / orders / aggregate``.

    Attributes:
        policy: what is asked of the nodes' updates.
    """

    init: Any
    orders: Any
    aggregate: Any
    shared: Any
    model: Any
    seed: int
    setup_rounds: int
    fraction_train: float
    needs: int

    def __init__(self) -> None:
        self.policy = WELL_FORMED
        self._offenders = Offenders(WELL_FORMED)
        self._asked, self._folds = 0, False
        self.state: Tensors | None = None
        self._sent: list[Order] = []
        self._population = 0

    def summary(self) -> None:
        log.info("%s: fraction-train %g, seed %d", type(self).__name__, self.fraction_train, self.seed)

    def sample(self, server_round: int, grid: Grid) -> list[int]:
        """Nodes of a round, drawn by position in ascending order of node id, so that equal grids sample alike; those
        that are set aside are drawn and not asked."""
        nodes = sorted(grid.get_node_ids())
        count = max(1, round(self.fraction_train * len(nodes)))
        draw = generator(self.seed, round=server_round, purpose="sample")
        chosen = [nodes[i] for i in np.sort(draw.choice(len(nodes), count, replace=False))]
        aside = set(self._offenders.aside)
        return [node for node in chosen if node not in aside]

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        if self.state is None or server_round == 1:
            self.state, self._offenders = self.init(to_tensors(arrays)), Offenders(self.policy)
            for setup in range(1 - self.setup_rounds, 1):
                self.aggregate_train(setup, grid.send_and_receive(self._messages(setup, grid)))
        return self._messages(server_round, grid)

    def _messages(self, server_round: int, grid: Grid) -> list[Message]:
        """The orders of a round, each to every node sampled."""
        self._sent = self.orders(server_round, self.state)
        self._population = len(list(grid.get_node_ids()))
        nodes = self.sample(server_round, grid)
        self._asked, self._folds = len(nodes), getattr(grid, "folds", False)
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
        refused: set[int] = set()
        before = self.state
        note = lambda node, reason: refused.add(node)  # noqa: E731
        collected = collect(replies, self._sent, self._population, self.policy, note, self._folds)
        for node in sorted(refused):
            if self._offenders.record(node):
                log.warning("node %d is set aside after %d refused rounds", node, self.policy.set_aside_after)
        for number, believed in enumerate(collected):
            void = self.policy.void(len(believed), self._asked, self.needs)
            if void is not None:
                log.warning("round %d: %s; the model stays as it is", server_round, void)
                self.state = before
                return None, None
            self.state = self.aggregate(server_round, self.state, self._sent[number], believed)
            losses += [(r.metrics.get("loss", 0.0), r.examples) for r in believed.singles]
        loss = sum(value * n for value, n in losses) / sum(n for _, n in losses)
        return to_dense_arrays(self.shared(self.state)), MetricRecord({"loss": loss, "clients": len(losses)})

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
            try:
                metrics: Any = dict(message.content[METRICS])  # type: ignore[arg-type]
                count, scores = metrics["num-examples"], {name: metrics[name] for name in sums}
                reason = refuse_count(count) or refuse_metrics(scores)
            except (KeyError, ValueError, TypeError) as error:
                reason = f"not a reply: {type(error).__name__}: {error}"
            if reason is not None:
                log.warning("node %d: evaluation rejected: %s", message.metadata.src_node_id, reason)
                continue
            examples += count
            for name, value in scores.items():
                sums[name] += value * count
        return MetricRecord({n: v / examples for n, v in sums.items()}) if examples else None


def collect(
    messages: Iterable[Message],
    orders: list[Order],
    population: int = 0,
    policy: Policy = WELL_FORMED,
    refused: Callable[[int, str], object] = lambda node, reason: None,
    folds: bool = False,
) -> list[Replies]:
    """Sort replies by order and client, and leave out, by name, what the guard does not believe.

    Args:
        refused: is told the node and the reason of every refused update.
        folds: the messages come from our own simulation, whose workers have checked what they fold.
    """
    from fedsim.strategy import Replies

    def leave_out(node: int, reason: str) -> None:
        log.warning("node %d: update rejected: %s", node, reason)
        refused(node, reason)

    singles: list[dict[int, Reply]] = [{} for _ in orders]
    partials: list[dict[int, Partial]] = [{} for _ in orders]
    for message in messages:
        node = message.metadata.src_node_id
        if message.has_error():
            log.warning("node %d: %s", node, message.error.reason)
            continue
        try:
            reply, number, partial = read_reply(message.content, orders)
            order = orders[number]
            summed = folds and (partial is not None or (order.fold and not reply.shared))
            reason = None if partial is None or folds else "a block's sum, expected one client's update"
            reason = reason or refuse(reply.shared, {} if summed else order.returned)
            reason = reason or refuse_count(reply.examples, policy.max_examples or None)
            reason = reason or refuse_metrics(reply.metrics) or refuse_report(reply.report)
            if reason is None and reply.shared and order.task == "train":
                reason = refuse_norm(reply.shared, order.shared, policy.max_update_norm)
        except (KeyError, ValueError, TypeError, IndexError) as error:
            reason = f"not a reply: {type(error).__name__}: {error}"
        if reason is not None:
            leave_out(node, reason)
            continue
        singles[number][node] = reply
        if partial is not None:
            partials[number][reply.client] = partial
    for replies in singles:
        for node, reason in refuse_odd({node: r.report for node, r in replies.items()}).items():
            leave_out(node, reason)
            del replies[node]
    collected = []
    for replies, partials_of, order in zip(singles, partials, orders):
        ordered = [partial for _, partial in sorted(partials_of.items())]
        # The first order of a run that was started with the whole model has more than is in the sums.
        held = ordered[0].tensors.keys() if ordered else ()
        sums = Tree(fan_of({n: v for n, v in order.returned.items() if n in held}))
        for partial in ordered:
            sums.append(partial)
        by_client = sorted(replies.values(), key=lambda r: r.client)
        collected.append(Replies(by_client, sums.settled(order.shared), order.weighting, population))
    return collected
