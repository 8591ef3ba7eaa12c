"""What runs where the data are: trains blocks of clients and evaluates models. The same object in this process and in
a Ray actor, so that where it runs cannot change a number."""

from __future__ import annotations

import copy
import gc
import math
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from fedsim.batches import BatchPlan, batch_plan
from fedsim.config import Training
from fedsim.data import Dataset, Partition
from fedsim.device_memory import free_bytes, kept_bytes, training_bytes
from fedsim.evaluation import Mode, Predict, mode_batches
from fedsim.examples import Examples
from fedsim.fold import Partial, merge
from fedsim.guard import refuse, refuse_form, refuse_norm, refuse_report, rows_finite
from fedsim.local import Block, ClientTask, Fetch, Outcomes, run_loop, score
from fedsim.lockstep import abreast, goes_in_lockstep, run_lockstep
from fedsim.optim import learning_rate
from fedsim.packing import Packed, States, columns, pack
from fedsim.random import generator, torch_generator
from fedsim.types import FOLDED, LowRank, Order, ReplyColumns, Tensors
from fedsim.vectorized import run_vmap, score_stacked, stacks_models

Executor = Callable[[ClientTask, Order, Block, float, Fetch], Iterator[Outcomes]]
EXECUTORS: dict[str, Executor] = {"loop": run_loop, "vmap": run_vmap}
# Convolutions and pooling want the channels of a pixel side by side; vmap folds clients into them and gains nothing.
LAYOUTS = {"loop": torch.channels_last, "vmap": torch.contiguous_format}


@dataclass(frozen=True)
class WorkerSpec:
    """Everything a worker holds for a whole run."""

    task: ClientTask
    dataset: Dataset
    shards: Partition
    training: Training
    seed: int
    rounds: int
    executor: str = "loop"
    evaluation_batch: int = 250
    modes: dict[str, Mode] = field(default_factory=dict)
    device: str = "cpu"
    debug: bool = False
    max_update_norm: float = 0.0  # see fedsim.guard.Policy
    time_limit: float = 0.0  # seconds a client may train, looked at before each of its steps; 0: any time
    threads: int = 1  # sums over threads have other bits, so they are the configuration's

    @cached_property
    def stacks(self) -> bool:
        """Whether the models of several clients are scored at once."""
        return self.executor == "vmap" and stacks_models(self.task, self.device)


@dataclass(frozen=True)
class Failure:
    """A client whose update of a round is not used, and why.

    Attributes:
        stage: ``train`` (its training failed), ``worker`` (so did the worker it ran on), ``reply`` (none came from a
            real client), ``time`` (it or its block took too long) or ``update`` (the guard does not believe what came).
        trace: where it was raised, if it was.
    """

    client: int
    stage: str
    reason: str
    trace: str = ""


@dataclass(frozen=True)
class Narrowed:
    """Clients that were to be trained at once and were tried again in halves, and why."""

    clients: tuple[int, ...]
    reason: str


@dataclass
class BlockResult:
    """One block's part of a round, in client order; ``partial`` holds the tensors if the order asked to fold."""

    replies: list[ReplyColumns] = field(default_factory=list)
    states: dict[int, Packed] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    partial: Partial | None = None
    dropped: int = 0  # examples left out by the last-batch policy
    narrowed: list[Narrowed] = field(default_factory=list)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "states": (list(self.states), States(list(self.states.values())))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        clients, states = state["states"]
        vars(self).update(state, states=dict(zip(clients, states)))


@dataclass(frozen=True)
class EvaluationJob:
    """One model on some examples: ``client`` -1 is the global model, otherwise ``private`` completes it.

    ``mode``: name of an evaluation mode; empty: the model as it is, which is the ordinary evaluation.
    """

    client: int
    domain: str
    split: str  # test | validation | unseen
    indices: np.ndarray
    private: Packed = field(default_factory=Packed.nothing)  # without memory
    mode: str = ""


class Jobs(list[EvaluationJob]):
    """Evaluation jobs whose models' private tensors are pickled as rows, like those that training is given."""

    def __reduce__(self) -> Any:
        bare = [replace(job, private=Packed.nothing()) for job in self]
        return _jobs, (bare, States([job.private for job in self]))


def _jobs(jobs: list[EvaluationJob], states: States) -> Jobs:
    return Jobs(replace(job, private=private) for job, private in zip(jobs, states))


@dataclass(frozen=True)
class Score:
    """Sums over the examples of an evaluation job."""

    client: int
    domain: str
    split: str
    correct: float
    loss: float
    examples: int


class OutOfTime(Exception):
    """Clients have trained for longer than they may."""


def out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed; torch's allocator for the CPU raises a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """So many of torch's threads, then one again."""
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(1)


def _keep_layout(model: torch.nn.Module) -> None:
    """Let gradients come back through a model's ``nn.Flatten`` in the layout of the features that went in. They would
    come as [B, C, H, W] in that order, and the layers before work on two layouts at once, at twice the time."""

    def back(gradient: torch.Tensor) -> torch.Tensor:
        return gradient.contiguous(memory_format=torch.channels_last)

    def watch(flatten: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        (x,) = inputs
        if x.requires_grad and x.dim() == 4:
            x.register_hook(back)

    for module in model.modules():
        if isinstance(module, torch.nn.Flatten):
            module.register_forward_pre_hook(watch)


class Worker:
    """Args:
    lends: whatever ``train`` returns is sent elsewhere before the next call, so it may be of the worker's own tensors.
    """

    def __init__(self, spec: WorkerSpec, lends: bool = False):
        gc.freeze()  # what is loaded by now stays: not to be looked through again with every thousand small objects
        torch.set_num_threads(1)  # sums over threads would make the bits depend on their number
        # The skeleton is written to, and what came through Ray's object store is memory shared by all workers.
        self.task = copy.deepcopy(spec.task)
        self.spec = replace(spec, task=self.task)
        self.lends = lends
        self.device = torch.device(spec.device)
        if self.device.type == "cuda":  # torch by itself lets convolutions use tf32, and products not
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = self.task.precision == "tf32"
        layout = LAYOUTS[spec.executor]
        self.task.model.to(self.device).to(memory_format=layout)  # type: ignore[call-overload]
        if layout is torch.channels_last:
            _keep_layout(self.task.model)
        self.examples = Examples(spec.dataset, self.device, getattr(torch, spec.training.dtype), layout)

    def examples_of(self, order: Order, client: int) -> np.ndarray:
        """What a client looks at for an order: its shard, or for tasks without training a development set, the share
        ``dev-fraction`` of the shard that stays the same in all rounds."""
        return self._chosen(order, [client], self.spec.shards[client][None])[0]

    @staticmethod
    def _count(order: Order, size: int) -> int:
        """How many examples of a shard an order looks at."""
        return size if order.task == "train" else max(1, round(size * order.scalars.get("dev-fraction", 1.0)))

    def _chosen(self, order: Order, clients: Sequence[int], shards: np.ndarray) -> np.ndarray:
        if order.task == "train":
            return shards
        size = shards.shape[1]
        rows = []
        for client, shard in zip(clients, shards):
            draw = generator(self.spec.seed, client=client, purpose="client")
            chosen = draw.permutation(size)[: self._count(order, size)]
            rows.append(shard[np.sort(chosen)])
        return np.stack(rows)

    def _plan(self, order: Order, clients: Sequence[int], shards: np.ndarray) -> BatchPlan:
        """The steps of clients with shards [k, n] of one size."""
        training, smallest = self.spec.training, self.task.smallest_batch
        examples = self._chosen(order, clients, shards)
        common: dict[str, Any] = {"smallest": smallest, "seed": self.spec.seed, "round": order.round}
        if order.task != "train":
            passes = int(order.scalars.get("passes", 1))
            return batch_plan(examples, clients, batch_size=training.batch_size, epochs=passes, **common)
        return batch_plan(
            examples,
            clients,
            batch_size=training.batch_size,
            epochs=training.epochs,
            steps=training.steps,
            shuffle=training.shuffle,
            last=training.last_batch,
            **common,
        )

    def _on_device(self, tensors: Tensors) -> Tensors:
        return tensors if self.device.type == "cpu" else {n: v.to(self.device) for n, v in tensors.items()}

    def train(self, order: Order, clients: Sequence[int], states: Sequence[Packed], threads: int = 1) -> BlockResult:
        """Carry out an order for a block of clients (ascending numbers), each with its private state.

        Args:
            threads: for this block, if they are more than the worker's own.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        with _threads(max(threads, self.spec.threads)), torch.random.fork_rng(devices):
            return self._train(order, clients, states)

    def _train(self, order: Order, clients: Sequence[int], states: Sequence[Packed]) -> BlockResult:
        spec, result = self.spec, BlockResult()
        lr = order.scalars.get("lr", None)
        if lr is None:
            t = spec.training
            lr = learning_rate(t.lr, t.schedule, order.round, spec.rounds, t.decay, t.decay_every)
        put = self._on_device
        order = replace(order, shared=put(order.shared), extra=put(order.extra), masks=put(order.masks))
        self.task.begin(order)
        block = self.block(order, clients, states, result)
        fetch = self.examples.fetcher(spec.seed, order.round, spec.training.augment)
        for part in self._parts(block):
            self._attempt(order, part, float(lr), self._timed(fetch, len(part)), result)
        if result.partial is not None:
            result.partial.complete()
        return result

    def _parts(self, block: Block) -> list[Block]:
        """What is trained at once. The loop is given one client at a time, so that one that fails does not end the
        others, or as many in lockstep as may take so much memory; vmap the whole block, or so many of it as the
        device has memory for."""
        width = 1
        if self.spec.executor == "vmap":
            free = free_bytes(self.device)
            width = len(block) if free is None else max(1, free // self._client_bytes)
        elif not self.spec.time_limit and goes_in_lockstep(self.task, block):
            width = abreast(self.task, block, self._kept)
        if width >= len(block):
            return [block] if len(block) else []
        count = math.ceil(len(block) / width)
        return [block.take(part.tolist()) for part in np.array_split(np.arange(len(block)), count)]

    def _executor(self, block: Block) -> Executor:
        return run_lockstep if self.spec.executor == "loop" and len(block) > 1 else EXECUTORS[self.spec.executor]

    @cached_property
    def _client_bytes(self) -> int:
        size = min(self.spec.training.batch_size, len(self.spec.shards.indices))
        return training_bytes(self.task, self.examples.batch("train", self.spec.shards.indices[:size])[0])

    @cached_property
    def _kept(self) -> int:
        """Bytes that autograd keeps of a client's forward pass in lockstep, whose models take no tokens."""
        size = min(self.spec.training.batch_size, int(self.spec.shards.sizes.max()))
        return kept_bytes(self.task, torch.zeros(size, *self.spec.dataset.shape, dtype=self.examples.dtype))

    def _timed(self, fetch: Fetch, clients: int) -> Fetch:
        """The same until the time of so many clients is up, which begins now: every step begins with its examples."""
        limit, started = self.spec.time_limit * clients, time.monotonic()

        def timed(*what: Any) -> tuple[torch.Tensor, torch.Tensor]:
            if time.monotonic() - started > limit:
                whose = "" if clients == 1 else f", for {clients} clients at once"
                raise OutOfTime(f"still training after {limit:g} s{whose}")
            return fetch(*what)

        return timed if limit else fetch

    def block(self, order: Order, clients: Sequence[int], states: Sequence[Packed], result: BlockResult) -> Block:
        """What the clients of a block do for an order; those that have no batch are put down in ``result``."""
        plans, idle = [], set[int]()
        for positions, shards in self.spec.shards.by_size(clients):
            plan = self._plan(order, [clients[p] for p in positions], shards)
            result.dropped += plan.layout.dropped * len(positions)
            if plan:
                plans.append((positions, plan))
                continue
            reason = f"{shards.shape[1]} examples make no batch of at least {self.task.smallest_batch}"
            result.failures += [Failure(clients[p], "train", reason) for p in positions]
            idle |= set(positions.tolist())
        # A sum over several clients need not be of tensors; a bound on each client's update looks at every one of them.
        sums = order.fold and order.task == "train" and len(clients) > 1 and not self.spec.max_update_norm
        factors = frozenset(order.returned) if sums and self.device.type == "cpu" else frozenset[str]()
        block = Block(list(clients), states, plans, factors, alone=len(clients) == 1)
        return block.take([p for p in range(len(clients)) if p not in idle]) if idle else block

    def _attempt(self, order: Order, block: Block, lr: float, fetch: Fetch, result: BlockResult) -> None:
        """Train clients at once. If that fails it is tried again in halves, down to single clients: memory may suffice
        for fewer, and a client that cannot be trained is found without costing the others. The block's sum is the same
        block's in any case, so the loop's bits stay; those of vmap depend on how many clients it stacks, and those of
        lockstep would if a row of a product depended on the others."""
        # The same draws for every order of a round; what a model draws does not depend on what its worker did before.
        draw = torch_generator(self.spec.seed, round=order.round, client=block.clients[0], purpose="dropout")
        torch.default_generator.manual_seed(draw.initial_seed())  # torch.manual_seed takes seven times as long
        if self.device.type == "cuda":
            torch.cuda.manual_seed(draw.initial_seed())
        try:
            for outcomes in self._executor(block)(self.task, order, block, lr, fetch):
                self._accept(order, outcomes, result, lend=self.lends and block.alone)
            return
        except OutOfTime as error:
            result.failures += [Failure(client, "time", str(error)) for client in block.clients]
            return
        except Exception as error:
            wanted = self.spec.debug and not (out_of_memory(error) and len(block) > 1)
            clients = ", ".join(map(str, block.clients))
            if wanted:
                error.add_note(f"in round {order.round}, stage 'train', client {clients}")
            if wanted and (len(block) == 1 or self.spec.executor == "vmap"):
                raise
            first = error if wanted else None  # a client of the loop is looked for first
            # As text: the exception holds on to everything the attempt had in memory.
            reason, trace = f"{type(error).__name__}: {error}", traceback.format_exc()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        done = {c for r in result.replies for c in r.clients} | {f.client for f in result.failures}
        left = [p for p, client in enumerate(block.clients) if client not in done]
        if len(block) == 1:
            result.failures += [Failure(block.clients[p], "train", reason, trace) for p in left]
            return
        result.narrowed.append(Narrowed(tuple(block.clients[p] for p in left), reason))
        half = (len(left) + 1) // 2
        for part in (left[:half], left[half:]):
            if part:
                self._attempt(order, block.take(part), lr, fetch, result)
        if first is not None:  # by themselves they do not fail
            raise first

    def _refusals(self, order: Order, outcomes: Outcomes, report: Tensors) -> dict[int, str]:
        """row -> why that client's update is not believed."""
        loss = outcomes.loss
        expected = {n: v for n, v in order.returned.items() if outcomes.factors.get(n) is None}
        bound = self.spec.max_update_norm if order.task == "train" else 0.0
        if not bound and refuse_form({n: v[0] for n, v in outcomes.shared.items()}, expected) is None:
            fine = rows_finite(outcomes.shared) & rows_finite(report) & torch.isfinite(loss).cpu()
            if bool(fine.all()):
                return {}
        found = {}
        for row, seen in enumerate(outcomes.seen):
            shared = {n: v[row] for n, v in outcomes.shared.items()}
            reason = refuse(shared, expected) or refuse_report({n: v[row] for n, v in report.items()})
            if reason is None and not math.isfinite(mean := float(loss[row]) / max(seen, 1)):
                reason = f"the training loss is {mean}"
            if reason is None:
                reason = refuse_norm(shared, order.shared, bound)
            if reason is not None:
                found[row] = reason
        return found

    def _accept(self, order: Order, outcomes: Outcomes, result: BlockResult, *, lend: bool) -> None:
        """Take the outcomes that can be believed into ``result``."""
        report = {n: v.detach().cpu() for n, v in outcomes.report.items()}
        refused = self._refusals(order, outcomes, report)
        result.failures += [Failure(outcomes.clients[row], "update", reason) for row, reason in refused.items()]
        rows = [row for row in range(len(outcomes.clients)) if row not in refused]
        if not rows:
            return
        pick = lambda tree: {n: v[rows] for n, v in tree.items()} if refused else tree  # noqa: E731
        shared, report, private, memory = map(pick, (outcomes.shared, report, outcomes.private, outcomes.memory))
        clients = [outcomes.clients[row] for row in rows]
        offsets, chosen = self.spec.shards.offsets, np.asarray(clients)
        examples = [self._count(order, size) for size in (offsets[chosen + 1] - offsets[chosen]).tolist()]
        folded = {n: v for n, v in report.items() if n.startswith(FOLDED)} if order.fold else {}
        report = {n: v for n, v in report.items() if n not in folded}
        shared = {n: v.cpu() for n, v in shared.items()}
        seen = [max(outcomes.seen[row], 1) for row in rows]
        per_example = lambda sums: [total / n for total, n in zip(sums[rows].tolist(), seen)]  # noqa: E731
        metrics = {
            "loss": per_example(outcomes.loss),
            "accuracy": per_example(outcomes.correct),
            "seen": [float(outcomes.seen[row]) for row in rows],
        }
        keep = lambda tree: {n: v.clone() for n, v in tree.items()}  # noqa: E731 (the loop's tensors are its own)
        replied = ReplyColumns(clients, examples, keep({} if order.fold else shared), keep(report), metrics)
        states: dict[int, Packed] = {}
        if order.task != "score" and (private or memory):
            states = dict(zip(clients, pack(private, memory, len(clients))))
        # Last of what may fail for want of memory: clients that are tried again must not be in the sum already.
        if order.fold:
            weights = [float(n) for n in examples] if order.weighting == "examples" else [1.0] * len(rows)
            self._fold(result, shared | folded, weights, order.shared, outcomes.factors, lend)
        result.replies.append(replied)
        result.states |= states

    @staticmethod
    def _fold(
        result: BlockResult,
        tensors: Tensors,
        weights: list[float],
        base: Tensors,
        factors: Mapping[str, LowRank | None],
        lend: bool,
    ) -> None:
        """Add clients' stacked tensors [k, ...], and a single one's ``factors`` of ``base``, to the block's sum."""
        if len(weights) > 1:
            partial = Partial.of_rows(tensors, weights)
            result.partial = partial if result.partial is None else merge([result.partial, partial])
            return
        tensors = {n: v[0] for n, v in tensors.items()}
        wide = {n: tensors.pop(n) if update is None else update for n, update in factors.items()}
        # Whatever takes much memory comes first: a client is in all of the block's sums or in none.
        if result.partial is None:
            partial = Partial.of(tensors, weights[0])
            if not lend:
                partial.own()
            partial.add_wide(base, wide, weights[0])
            result.partial = partial
        else:
            result.partial.sums()
            result.partial.add_wide(base, wide, weights[0])
            result.partial.add(tensors, weights[0])

    def evaluate(self, shared: Tensors, jobs: Sequence[EvaluationJob]) -> list[Score]:
        """Accuracy and loss in evaluation mode. Under vmap, jobs that differ in private tensors alone are scored at
        once where that is faster; the scores are the same up to rounding."""
        with _threads(self.spec.threads), torch.no_grad():
            return self._evaluate(shared, jobs)

    def _evaluate(self, shared: Tensors, jobs: Sequence[EvaluationJob]) -> list[Score]:
        shared = self._on_device(shared)
        together: dict[tuple[str, bytes], list[int]] = {}  # by domain and what is private
        scores: dict[int, Score] = {}
        for position, job in enumerate(jobs):
            if self.spec.stacks and job.client >= 0 and job.split == "test" and not job.mode:
                together.setdefault((job.domain, job.private.layout.head), []).append(position)
            else:
                scores[position] = self._score(shared, job)
        for positions in together.values():
            scores |= zip(positions, self._score_together(shared, [jobs[p] for p in positions]))
        return [scores[position] for position in range(len(jobs))]

    def _score(self, shared: Tensors, job: EvaluationJob) -> Score:
        model = self.task.model.eval()
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for name, value in {**shared, **job.private.unpack().private}.items():
            named[name].copy_(value)
        split = "train" if job.split == "validation" else "test"  # validation examples are held-out training ones
        hits, loss = 0.0, 0.0
        with self._predictor(job) as (predict, batches):
            for indices in batches:
                x, y = self.examples.batch(split, indices)
                right, mean = score(predict(x), y)
                hits += float(right)
                loss += float(mean) * len(y)
        return Score(job.client, job.domain, job.split, hits, loss, len(job.indices))

    def _score_together(self, shared: Tensors, jobs: Sequence[EvaluationJob]) -> list[Score]:
        """Jobs on the same examples; in halves if there is no memory for them at once."""
        self.task.model.eval()
        indices, size = jobs[0].indices, self.spec.evaluation_batch
        batches = (self.examples.batch("test", indices[i : i + size]) for i in range(0, len(indices), size))
        try:
            private, _ = columns([job.private for job in jobs], self.device)
            hits, loss = score_stacked(self.task, shared, private, batches)
        except Exception as error:
            if len(jobs) == 1 or not out_of_memory(error):
                raise
            half = len(jobs) // 2
            return self._score_together(shared, jobs[:half]) + self._score_together(shared, jobs[half:])
        return [Score(j.client, j.domain, j.split, h, total, len(indices)) for j, h, total in zip(jobs, hits, loss)]

    @contextmanager
    def _predictor(self, job: EvaluationJob) -> Iterator[tuple[Predict, list[np.ndarray]]]:
        """(what to call on each batch, the batches) of a job whose tensors are loaded."""
        size = self.spec.evaluation_batch
        if not job.mode:
            yield self.task.model, [job.indices[i : i + size] for i in range(0, len(job.indices), size)]
            return
        batches = mode_batches(job.indices, size, self.spec.seed)

        def target() -> Iterator[torch.Tensor]:
            return (self.examples.batch("test", indices)[0] for indices in batches)

        def source() -> Iterator[torch.Tensor]:
            own = mode_batches(self.spec.shards[job.client], size, self.spec.seed)
            return (self.examples.batch("train", indices)[0] for indices in own)

        with self.spec.modes[job.mode].open(self.task.model, target, source) as predict:
            yield predict, batches
