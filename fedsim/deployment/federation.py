"""The federation of real clients, as the round loop knows it: sample, train, evaluate.

Clients reply singly; their tensors are folded by the simulation's blocks in its order, so that the bits agree. A client
that is gone, late or not believable is left out of the order by name, and the others count. One that comes back before
the order is over gets it again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from logging import getLogger
from typing import Any

from flwr.app import Message, RecordDict

from fedsim.build import Plan, policy_of
from fedsim.deployment import fleet
from fedsim.deployment.jobs import JOB, LOCAL, Job, end_of, sequence
from fedsim.deployment.link import Incomplete, Link
from fedsim.deployment.members import Member
from fedsim.deployment.wire import pack, unpack
from fedsim.engine import Federation, blocks_and_threads, cut
from fedsim.errors import FedsimError
from fedsim.flower import METRICS, order_content, read_reply
from fedsim.fold import Partial, Tree, fan_of
from fedsim.guard import refuse, refuse_count, refuse_metrics, refuse_norm, refuse_odd, refuse_report
from fedsim.pool import InProcess
from fedsim.store import ClientStore
from fedsim.strategy import Replies
from fedsim.types import FOLDED, Order, Reply, Tensors
from fedsim.worker import Failure, Score

log = getLogger("fedsim")
PAUSE = 0.02  # seconds at most between two looks at what arrived


@dataclass(frozen=True)
class Patience:
    """Seconds: until a silent client counts as gone, for one order, and for clients that are not there (yet)."""

    silent: float = 20.0
    order: float = 600.0
    absent: float = 3600.0


@dataclass
class Sent:
    """An order on its way to one client."""

    member: Member
    id: str
    activations: int
    envelope: Message | None = None


@dataclass
class Errand:
    """Questions to several clients, until every one has answered or is given up."""

    open: dict[int, Sent] = field(default_factory=dict)
    answers: dict[int, Message] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    repeated: int = 0


def exchange(
    link: Link, members: dict[int, Member], content: Callable[[int], RecordDict], kind: str, patience: Patience
) -> Errand:
    """Send ``content(client)`` to every client and collect the answers.

    Raises:
        FedsimError: all clients are gone for longer than ``patience.absent``.
    """
    errand = Errand()
    waiting = dict(members)
    started = alone = time.monotonic()
    told = False
    while waiting or errand.open:
        now = time.monotonic()
        collect(link, errand)
        _look_after(link, errand, waiting, patience)
        for client, member in list(waiting.items()):
            if link.members.present(member, patience.silent):
                id = link.send(member, content(client), kind)
                errand.open[client] = Sent(member, id, member.activations)
                del waiting[client]
        if errand.open:
            if told:
                started, told = now, False  # the time nobody was there does not count
            alone = now
            if now - started > patience.order:
                for client in list(errand.open):
                    give_up(link, errand, client, f"no answer within {patience.order:g} s")
        elif errand.answers or errand.failed:
            errand.failed |= dict.fromkeys(waiting, "the client is gone")
            waiting.clear()
        elif waiting:
            if not told:
                log.warning("all clients are gone; waiting for them to come back")
                told = True
            if now - alone > patience.absent:
                raise FedsimError(f"no client was there for {patience.absent:g} s")
        if waiting or errand.open:
            link.wait(PAUSE)
    return errand


def collect(link: Link, errand: Errand) -> None:
    """Move what arrived from ``open`` to ``answers`` or ``failed``."""
    ids = {sent.id: client for client, sent in errand.open.items()}
    for envelope in link.arrived(ids) if ids else []:
        client = ids.get(envelope.metadata.reply_to_message_id)
        if client is not None:
            errand.open[client].envelope = envelope
    for client, sent in list(errand.open.items()):
        if sent.envelope is None:
            continue
        try:
            message = link.content(sent.envelope)
        except Incomplete:
            continue
        except Exception as error:  # the client may have sent anything
            give_up(link, errand, client, f"not a reply: {type(error).__name__}")
            continue
        link.forget([sent.id])
        del errand.open[client]
        if message.has_error():
            errand.failed[client] = message.error.reason or "the client reports an error"
        else:
            errand.answers[client] = message


def _look_after(link: Link, errand: Errand, waiting: dict[int, Member], patience: Patience) -> None:
    """Clients that restarted get their order again; those that are gone are waited for only if nobody is left."""
    for client, sent in list(errand.open.items()):
        back = sent.member.activations != sent.activations
        if not back and link.members.present(sent.member, patience.silent):
            continue
        link.forget([sent.id])
        del errand.open[client]
        waiting[client] = sent.member
        errand.repeated += back


def give_up(link: Link, errand: Errand, client: int, reason: str) -> None:
    """Wait no longer for a client's answer, and refuse it should it come."""
    link.forget([errand.open.pop(client).id])
    errand.failed[client] = reason


class RemoteFederation(Federation):
    """
    Args:
        members: the transport's identity of each client number.
        sizes: (training, validation, test) examples of each client, as announced at the start.
        job: what all orders of this run have in common.
        oldest: round of the oldest checkpoint.
    """

    def __init__(
        self,
        planned: Plan,
        link: Link,
        members: dict[int, Member],
        sizes: dict[int, tuple[int, int, int]],
        job: Job,
        patience: Patience,
        oldest: Callable[[], int],
    ):
        spec = planned.spec
        super().__init__(
            spec,
            InProcess(spec),
            ClientStore(),
            cohort=planned.cohort,
            block=planned.config.simulation.block,
            odd_block_threads=planned.config.simulation.odd_block_threads,
            policy=policy_of(planned.config),
            needs=planned.strategy.needs,
        )
        self.link, self.members, self.sizes, self.job = link, members, sizes, job
        self.patience, self.oldest = patience, oldest
        self.round, self.order = 0, -1
        self.before: dict[int, tuple[int, int]] = {}

    def domains(self, client: int) -> list[str]:
        shards = self.spec.shards
        return [shards.domains[shards.domain[client]]]

    def _exchange(self, content: RecordDict, kind: str, jobs: Mapping[int, Job]) -> Errand:
        """Args: jobs: of each client that is asked."""
        packed = pack(content)

        def addressed(client: int) -> RecordDict:
            return RecordDict({**packed, JOB: replace(jobs[client], client=client).record()})

        with fleet.no_object_id_recompute():  # the tensors are the same for all: hashed once, not for every client
            return exchange(self.link, {c: self.members[c] for c in jobs}, addressed, kind, self.patience)

    def train(self, order: Order, clients: Sequence[int]) -> Replies:
        clients = sorted(clients)
        self.order = self.order + 1 if order.round == self.round else 0
        self.round = order.round
        self.before = {c: (self.members[c].sent, self.members[c].received) for c in clients}
        job = replace(self.job, sequence=sequence(order.round, self.order), oldest=self.oldest())
        blocks = blocks_and_threads(clients, self.block, self.odd_block_threads)
        jobs = {client: replace(job, threads=threads) for block, threads in blocks for client in block}
        errand = self._exchange(order_content(order, self.order), "train", jobs)
        self.failures, self.dropped, self.retried = [], 0, errand.repeated
        believed: dict[int, Reply] = {}
        for client in clients:
            if client in errand.failed:
                self.failures.append(Failure(client, "reply", errand.failed[client]))
                continue
            reply, dropped, reason = self._believe(errand.answers[client].content, client, order)
            if reason is not None:
                self.failures.append(Failure(client, "update", reason))
                continue
            believed[client] = reply
            self.dropped += dropped
        replies = self._fold(order, clients, believed)
        # In a void round the server's state stays; what real clients keep private is theirs and has moved on.
        self.void = self.policy.void(len(replies), len(clients), self.needs)
        return replies

    def _believe(self, content: RecordDict, client: int, order: Order) -> tuple[Reply, int, str | None]:
        """(reply, examples dropped, why it is not used)."""
        nothing = Reply(client, 0, {})
        try:
            content = unpack(content)
            reply, number, partial = read_reply(content, [order] * (self.order + 1))
            dropped = int(content[LOCAL]["dropped"])  # type: ignore[index, arg-type]
            reason = refuse(reply.shared, order.returned) or refuse_report(reply.report)
            reason = reason or refuse_count(reply.examples, self.sizes[client][0]) or refuse_metrics(reply.metrics)
            if reason is None and order.task == "train":
                reason = refuse_norm(reply.shared, order.shared, self.policy.max_update_norm)
            if reason is None and (number != self.order or partial is not None or dropped < 0):
                reason = "the reply is not to this order"
            if reason is None and not {"loss", "accuracy", "seen"} <= reply.metrics.keys():
                reason = "metrics are missing"
        except Exception as error:  # the client may have sent anything
            return nothing, 0, f"not a reply: {type(error).__name__}: {str(error)[:200]}"
        # Who sent it is known from the key that signed the call, whatever the payload says.
        return replace(reply, client=client), dropped, reason

    def _fold(self, order: Order, clients: list[int], believed: dict[int, Reply]) -> Replies:
        model_sized = lambda r: {n: v for n, v in r.report.items() if n.startswith(FOLDED)}  # noqa: E731
        for client, reason in refuse_odd({c: r.report for c, r in believed.items()}).items():
            self.failures.append(Failure(client, "update", reason))
            del believed[client]
        singles = [believed[c] for c in clients if c in believed]
        if not order.fold:
            return Replies(singles, [], order.weighting, len(self))
        sums = Tree(fan_of(order.returned))
        for block in cut(clients, self.block):
            partial: Partial | None = None
            for client in block:
                if client not in believed:
                    continue
                reply = believed[client]
                weight = float(reply.examples) if order.weighting == "examples" else 1.0
                tensors = {**reply.shared, **model_sized(reply)}
                if partial is None:
                    partial = Partial.of(tensors, weight)
                else:
                    partial.add(tensors, weight)
            if partial is not None:
                sums.append(partial)
        partials = sums.settled(order.shared)
        return Replies([replace(r, shared={}) for r in singles], partials, order.weighting, len(self))

    def traffic(self, order: Order, clients: Sequence[int], replies: Replies) -> tuple[int, int]:
        """Serialized messages of this order, as the server saw them."""
        moved = [self._moved(c) for c in self.before]
        return sum(d for d, _ in moved), sum(u for _, u in moved)

    def _moved(self, client: int) -> tuple[int, int]:
        member, (sent, received) = self.members[client], self.before[client]
        return member.sent - sent, member.received - received

    def client_metrics(self) -> list[tuple[int, str, float]]:
        rows = []
        for client in self.before:
            down, up = self._moved(client)
            rows += [(client, "bytes_down", float(down)), (client, "bytes_up", float(up))]
        return rows

    def evaluate(self, shared: Tensors, split: str = "test") -> list[Score]:
        """Clients evaluate on what they hold. Without private tensors the first client of a domain that answers
        stands for its domain, as the simulation scores each domain once."""
        return self._evaluate_remotely(shared, split)

    def evaluate_mode(self, shared: Tensors, name: str, split: str = "test") -> list[Score]:
        """Each client applies the mode to its own model where its data are; the result is as in a simulation."""
        return self._evaluate_remotely(shared, split, name) if split in self.spec.modes[name].splits else []

    def _evaluate_remotely(self, shared: Tensors, split: str, mode: str = "") -> list[Score]:
        if split == "unseen":
            return []  # a left-out domain has no client
        column = {"test": 2, "validation": 1}[split]
        clients = [c for c in range(len(self)) if self.sizes[c][column]]
        if not clients:
            return []
        single = split == "test" and not self.private and not (mode and self.spec.modes[mode].own_examples)
        if single:
            each = len(self) // len(self.spec.shards.domains)
            clients = clients[::each]
        round = max(self.round, 1)
        job = replace(self.job, sequence=end_of(round), oldest=self.oldest(), split=split, mode=mode)
        content = order_content(Order(round, shared, task="evaluate"))
        errand = self._exchange(content, "evaluate", dict.fromkeys(clients, job))
        scores = []
        for client in clients:
            reason = errand.failed.get(client)
            if reason is None:
                score, reason = self._score(errand.answers[client].content, client, split, single)
                scores += [score] if score is not None else []
            if reason is not None:
                log.warning("round %d: client %d is not evaluated: %s", round, client, reason)
        if not scores:
            raise FedsimError(f"round {round}: no client could be evaluated")
        return scores

    def _score(self, content: RecordDict, client: int, split: str, single: bool) -> tuple[Score | None, str | None]:
        try:
            metrics: Any = dict(content[METRICS])  # type: ignore[arg-type]
            correct, loss, examples = metrics["correct"], metrics["loss"], metrics["num-examples"]
            reason = refuse_count(examples, max(self.sizes[client][1:])) or refuse_metrics(metrics)
            if reason is None and not 0 <= correct <= examples:
                reason = f"{correct} correct of {examples}"
        except Exception as error:  # the client may have sent anything
            return None, f"not a score: {type(error).__name__}"
        if reason is not None:
            return None, reason
        number = -1 if single else client
        return Score(number, self.domains(client)[0], split, float(correct), float(loss), int(examples)), None
