"""The simulated federation: samples clients, cuts the cohort into blocks, maps blocks over workers, folds.

Knows no algorithm. The result of a round depends on the configuration and the seed alone, not on the number of
workers nor on which of them finished first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from fedsim.errors import FedsimError
from fedsim.fold import LARGE, Partial, Tree, fan_of, mean, merge
from fedsim.guard import WELL_FORMED, Policy
from fedsim.packing import Packed, States
from fedsim.pool import Pool, SumLost, WorkerLost
from fedsim.random import generator
from fedsim.store import ClientStore
from fedsim.strategy import Replies, Rows
from fedsim.traffic import order_bytes, replies_bytes
from fedsim.types import ClientState, Order, ReplyColumns, Tensors
from fedsim.worker import BlockResult, EvaluationJob, Failure, Jobs, Narrowed, Score, WorkerSpec

VMAP_BLOCK = 1024  # clients: beyond, a step's overhead is nothing beside its work
VMAP_BYTES = 1 << 26  # of one copy of the stacked parameters; gradients and activations come on top
WINDOW = 2048  # evaluations under way at a time
STACK = 32  # models scored at once under vmap


def block_size(executor: str, cohort: int, model_bytes: int) -> int:
    """The default block: vmap wants many clients at once, but two workers something to do; the loop enough blocks to
    keep more of them busy, though the sums of a large model are costly to move."""
    if executor != "vmap":
        return math.ceil(cohort / (16 if model_bytes < LARGE else 8))
    return min(math.ceil(cohort / 2), VMAP_BLOCK, max(8, VMAP_BYTES // max(model_bytes, 1)))


def cut(clients: Sequence[int], block: int) -> list[list[int]]:
    """Blocks of at most ``block`` clients, even in number (more than two: a multiple of four) and in size, the larger
    first, so that up to four workers end together. What a block is must not depend on how many there are."""
    count = math.ceil(len(clients) / block)
    if count > 2:
        count = min(len(clients), 4 * math.ceil(count / 4))
    sizes = [len(clients) // count + (number < len(clients) % count) for number in range(count)]
    edges = itertools.accumulate(sizes, initial=0)
    return [list(clients[a:b]) for a, b in itertools.pairwise(edges)]


def blocks_and_threads(clients: Sequence[int], block: int, odd_block_threads: int) -> list[tuple[list[int], int]]:
    """The blocks of ``cut`` with torch's threads for each, if they are more than a worker's own: an even number of
    workers trains blocks in pairs, and one of them is idle beside the last of an odd number."""
    blocks = cut(clients, block)
    last = len(blocks) - 1 if len(blocks) % 2 else -1
    return [(each, odd_block_threads if number == last else 1) for number, each in enumerate(blocks)]


class Federation:
    """Clients' data and private state, and the pool that trains them.

    Args:
        spec: what the workers were built from.
        cohort: clients sampled in a round.
        block: clients of a block (the unit of scheduling, of vectorisation and of partial sums).
        odd_block_threads: threads for the last block if their number is odd. Sums over threads have other bits, so they
            are the configuration's, whatever workers there are.
        validation: held-out training examples of each client, if any.
        unseen: a domain that no client holds, or "".
        policy: what is asked of updates. needs: updates without which the server rule cannot work.
        never_sampled: what a client that has never trained keeps in an evaluation mode: ``initial`` or ``mean``.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        pool: Pool,
        store: ClientStore,
        *,
        cohort: int,
        block: int,
        odd_block_threads: int = 1,
        validation: Sequence[np.ndarray] | None = None,
        unseen: str = "",
        policy: Policy = WELL_FORMED,
        needs: int = 1,
        never_sampled: str = "initial",
    ):
        self.spec, self.pool, self.store = spec, pool, store
        self.cohort, self.block, self.odd_block_threads = cohort, block, odd_block_threads
        self.validation, self.unseen, self.never_sampled = validation, unseen, never_sampled
        _, self.private = spec.task.initial()
        self.untrained = Packed.of(ClientState(self.private))
        self.policy, self.needs = policy, needs
        self.failures: list[Failure] = []
        self.void: str | None = None
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.dropped = self.retried = 0

    def __len__(self) -> int:
        return len(self.spec.shards)

    @property
    def blocks(self) -> int:
        """In a round."""
        return len(cut(range(self.cohort), self.block))

    @property
    def shared(self) -> Tensors:
        """The shared tensors as they are before the first round: a copy every time, since a run needs it once."""
        return self.spec.task.initial()[0]

    def sample(self, round: int) -> list[int]:
        """The clients of a round, ascending."""
        if self.cohort >= len(self):
            return list(range(len(self)))
        draw = generator(self.spec.seed, round=round, purpose="sample")
        return sorted(draw.choice(len(self), self.cohort, replace=False).tolist())

    def state(self, client: int) -> ClientState:
        """A client's private state; one that was never trained has the initial private tensors."""
        found = self.store.get(client)
        return found.unpack() if found else ClientState(self.private)

    def packed(self, client: int) -> Packed:
        """The same as it travels."""
        return self.store.get(client) or self.untrained

    def newcomer(self) -> Tensors:
        """Private tensors of a client that holds no training data: the plain mean over the clients that have trained
        (the advice of FedBN's authors for external clients), or the initial ones if none has."""
        states = self.kept()
        first = next(states, None)
        if first is None:
            return self.private
        return mean([merge(Partial.of(s, 1.0) for s in itertools.chain([first], states))], self.private)

    def kept(self) -> Iterator[Tensors]:
        """Private tensors of the clients that have trained."""
        if self.private:
            yield from (found.unpack().private for c in range(len(self)) if (found := self.store.get(c)))

    def train(self, order: Order, clients: Sequence[int]) -> Replies:
        """Carry out an order.

        Afterwards ``self.failures`` holds the clients whose updates are not used, ``self.dropped`` the examples left
        out by the last-batch policy, ``self.retried`` the clients whose block was repeated, ``self.events`` what else
        is worth a line in the run's events: of this order alone. If too few updates can be used, ``self.void`` says so,
        and the clients keep the private state they had.
        """
        try:
            columns, partials = self._trained(order, clients, apart=self.pool.apart)
        except SumLost as lost:  # a block is a pure function of its arguments, and no state has been accepted yet
            columns, partials = self._trained(order, clients, apart=False)
            self.retried = len(clients)
            self.events.insert(0, ("retried", {"clients": [*clients], "reason": str(lost)}))
        replies = Rows(columns)
        self.void = self.policy.void(len(replies), len(clients), self.needs)
        if self.void is None:
            self.store.accept()
        else:
            self.store.discard()
        return Replies(replies, partials, order.weighting, len(self))

    def _trained(
        self, order: Order, clients: Sequence[int], *, apart: bool
    ) -> tuple[list[ReplyColumns], list[Partial]]:
        """The replies, and what the blocks' sums come to.

        Args:
            apart: if there are many of them and they are large, they are not added here, but by the pool.
        """
        columns: list[ReplyColumns] = []
        fan = fan_of(order.returned)
        apart = apart and order.fold and len(cut(clients, self.block)) > fan
        sums = Tree(fan, partial(self.pool.group, apart))
        for result in self._results(order, clients, apart=apart):
            columns += result.replies
            if result.partial is not None:
                sums.append(result.partial)
                result.partial = None
        return columns, sums.settled(order.shared)

    def train_blocks(self, order: Order, clients: Sequence[int]) -> list[BlockResult]:
        """The results in block order; the clients' new private states are stored."""
        results = list(self._results(order, clients))
        self.store.accept()
        return results

    def _results(self, order: Order, clients: Sequence[int], *, apart: bool = False) -> Iterator[BlockResult]:
        """Results in block order, as soon as they and all before them are there; the new states are staged.

        Args:
            apart: the blocks' sums are for the pool's groups.
        """
        self.store.discard()
        calls = _Calls(blocks_and_threads(sorted(clients), self.block, self.odd_block_threads), self.packed)
        self.failures, self.dropped = [], 0
        narrowed: list[Narrowed] = []
        early: dict[int, BlockResult] = {}
        arrivals, following = self.pool.map("train", order, calls, apart=apart), 0
        for number, result in arrivals:
            if isinstance(result, WorkerLost):
                lost = [Failure(c, result.stage, str(result)) for c in calls.clients(number)]
                result = BlockResult(failures=lost)
            for client, state in result.states.items():
                self.store.stage(client, order.round, state)
            result.states = {}
            early[number] = result
            while following in early:
                result = early.pop(following)
                following += 1
                narrowed += result.narrowed
                self.dropped += result.dropped
                self.failures += result.failures
                yield result
        repeated = [(calls.clients(number), why) for number, why in self.pool.retried]
        self.retried = sum(len(block) for block, _ in repeated)
        self.events = [("retried", {"clients": block, "reason": why}) for block, why in repeated]
        self.events += [("narrowed", {"clients": [*n.clients], "reason": n.reason}) for n in narrowed]

    def evaluate(self, shared: Tensors, split: str = "test") -> list[Score]:
        """Every distinct (model, domain) once.

        Without private tensors there is one model: it is scored on each domain (client -1). With them every
        client's own model is scored on the test split of each domain it holds data of. ``validation`` scores each
        client on its held-out examples; ``unseen`` scores the model of a newcomer on the domain left out.

        Raises:
            FedsimError: a worker could not finish it as often as retries allow.
        """
        return self._evaluate(shared, self._jobs(split))

    def evaluate_mode(self, shared: Tensors, name: str, split: str = "test") -> list[Score]:
        """The same under an evaluation mode; ``split`` is ``test`` or ``unseen``."""
        mode = self.spec.modes[name]
        if split not in mode.splits:
            return []
        gathered = mode.gather(list(self.kept()) or [self.private]) if mode.gathers else {}
        newcomer = self.newcomer() if self.never_sampled == "mean" and split == "test" else {}

        def jobs() -> Iterator[EvaluationJob]:
            for job in self._trained_on_unseen() if mode.every_model else self._jobs(split, mode.own_examples):
                replaced = newcomer if newcomer and job.client >= 0 and not self.store.get(job.client) else {}
                private = job.private
                if replaced or gathered:
                    private = Packed.of(ClientState({**private.unpack().private, **replaced, **gathered}))
                yield replace(job, mode=name, private=private)

        return mode.choose(self._evaluate(shared, jobs()))

    def _trained_on_unseen(self) -> Iterator[EvaluationJob]:
        """The model of every client that has trained, on the domain left out."""
        indices = self.spec.dataset.slice(self.unseen, "test")
        for client in range(len(self)):
            if found := self.store.get(client):
                yield EvaluationJob(client, self.unseen, "unseen", indices, found.without_memory())

    def _evaluate(self, shared: Tensors, every: Iterator[EvaluationJob]) -> list[Score]:
        scores = []
        # A window at a time: each job carries a client's private tensors, which are in memory only so long.
        while jobs := list(itertools.islice(every, WINDOW)):
            chunks = self._chunks(jobs)
            found: dict[int, Score] = {}
            for number, result in self.pool.map("evaluate", shared, [(Jobs(jobs[i] for i in c),) for c in chunks]):
                if isinstance(result, WorkerLost):
                    mend = "; raise simulation.time-limit, or set it to 0" if result.stage == "time" else ""
                    raise FedsimError(f"evaluation failed: {result}{mend}")
                found |= zip(chunks[number], result)
            scores += [found[i] for i in range(len(jobs))]
        return scores

    def _chunks(self, jobs: Sequence[EvaluationJob]) -> list[list[int]]:
        """Positions of the jobs that go to a worker together: by the configuration, never by the number of workers."""
        if self.spec.stacks:
            alike: dict[tuple[str, str], list[int]] = {}
            for position, job in enumerate(jobs):
                alike.setdefault((job.domain, job.mode), []).append(position)
            return [g[i : i + STACK] for g in alike.values() for i in range(0, len(g), STACK)]
        size = math.ceil(len(jobs) / 64)
        return [list(range(i, min(i + size, len(jobs)))) for i in range(0, len(jobs), size)]

    def _jobs(self, split: str, every_client: bool = False) -> Iterator[EvaluationJob]:
        dataset, shards = self.spec.dataset, self.spec.shards

        def own_model(client: int, domain: str, indices: np.ndarray) -> EvaluationJob:
            return EvaluationJob(client, domain, split, indices, self.packed(client).without_memory())

        if split == "validation":
            if self.validation is None:
                return
            for client, indices in enumerate(self.validation):
                if len(indices):
                    yield own_model(client, self.domains(client)[0], indices)
        elif split == "unseen":
            if self.unseen:
                private = Packed.of(ClientState(self.newcomer()))
                yield EvaluationJob(-1, self.unseen, split, dataset.slice(self.unseen, "test"), private)
        elif not self.private and not every_client:
            for domain in shards.domains:
                yield EvaluationJob(-1, domain, split, dataset.slice(domain, "test"))
        else:
            for client in range(len(shards)):
                for domain in self.domains(client):
                    yield own_model(client, domain, dataset.slice(domain, "test"))

    def traffic(self, order: Order, clients: Sequence[int], replies: Replies) -> tuple[int, int]:
        """(bytes down, bytes up) of an order: what its serialized messages would take on a wire."""
        up = replies_bytes(order, replies.singles, replies.folded(order.shared))
        return len(clients) * order_bytes(order), up

    def client_metrics(self) -> list[tuple[int, str, float]]:
        """(client, name, value): what else is known of the clients after an order."""
        return []

    def close(self) -> None:
        self.pool.close()

    def domains(self, client: int) -> list[str]:
        """Names of the domains a client holds examples of."""
        shards = self.spec.shards
        if shards.domain[client] >= 0:
            return [shards.domains[shards.domain[client]]]
        present = np.unique(self.spec.dataset.domain_train[shards[client]])
        return [self.spec.dataset.domains[d] for d in present]


class _Calls(Sequence[tuple[list[int], States, int]]):
    """The arguments of every block's training. States are read when a pool asks for a block's, so that those of a few
    blocks are in memory at a time and reading them hides behind training."""

    def __init__(self, blocks: list[tuple[list[int], int]], state: Callable[[int], Packed]):
        self.blocks, self.state = blocks, state

    def __len__(self) -> int:
        return len(self.blocks)

    def clients(self, number: int) -> list[int]:
        return self.blocks[number][0]

    def __getitem__(self, number: Any) -> Any:
        block, threads = self.blocks[number]
        return block, States([self.state(client) for client in block]), threads
