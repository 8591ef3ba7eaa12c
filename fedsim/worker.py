"""What runs where the data are: trains blocks of clients and evaluates models. The same object in this process and in
a Ray actor, so that where it runs cannot change a number."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch.nn import functional as F

from fedsim.batches import batch_plan
from fedsim.config import Training
from fedsim.data import Dataset, Partition
from fedsim.evaluation import Mode, Predict, mode_batches
from fedsim.examples import Examples
from fedsim.fold import Partial
from fedsim.guard import refuse, refuse_report
from fedsim.local import ClientTask, Outcome, Work, correct, run_loop
from fedsim.optim import learning_rate
from fedsim.random import generator
from fedsim.types import FOLDED, ClientState, Order, Reply, Tensors
from fedsim.vectorized import run_vmap

Executor = Callable[[ClientTask, Order, Sequence[Work], float], Iterator[Outcome]]
EXECUTORS: dict[str, Executor] = {"loop": run_loop, "vmap": run_vmap}


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


@dataclass(frozen=True)
class Failure:
    """A client whose update of a round is not used, and why."""

    client: int
    stage: str  # train | update
    reason: str
    trace: str = ""


@dataclass
class BlockResult:
    """One block's part of a round, in client order; ``partial`` holds the tensors if the order asked to fold."""

    replies: list[Reply] = field(default_factory=list)
    states: dict[int, ClientState] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    partial: Partial | None = None
    dropped: int = 0  # examples left out by the last-batch policy


@dataclass(frozen=True)
class EvaluationJob:
    """One model on some examples: ``client`` -1 is the global model, otherwise ``private`` completes it.

    ``mode``: name of an evaluation mode; empty: the model as it is, which is the ordinary evaluation.
    """

    client: int
    domain: str
    split: str  # test | validation | unseen
    indices: np.ndarray
    private: Tensors = field(default_factory=dict)
    mode: str = ""


@dataclass(frozen=True)
class Score:
    """Sums over the examples of an evaluation job."""

    client: int
    domain: str
    split: str
    correct: float
    loss: float
    examples: int


class Worker:
    def __init__(self, spec: WorkerSpec):
        torch.set_num_threads(1)  # sums over threads would make the bits depend on their number
        # The skeleton is written to, and what came through Ray's object store is memory shared by all workers.
        self.task = copy.deepcopy(spec.task)
        self.spec = spec
        self.device = torch.device(spec.device)
        self.task.model.to(self.device)
        self.examples = Examples(spec.dataset, self.device, getattr(torch, spec.training.dtype))

    def examples_of(self, order: Order, client: int) -> np.ndarray:
        """What a client looks at for an order: its shard, or for tasks without training a development set, the share
        ``dev-fraction`` of the shard that stays the same in all rounds."""
        shard = self.spec.shards[client]
        if order.task == "train":
            return shard
        count = max(1, round(len(shard) * order.scalars.get("dev-fraction", 1.0)))
        chosen = generator(self.spec.seed, client=client, purpose="client").permutation(len(shard))[:count]
        return shard[np.sort(chosen)]

    def _plan(self, order: Order, client: int, smallest: int) -> tuple[list[np.ndarray], int]:
        shard, training, seed = self.examples_of(order, client), self.spec.training, self.spec.seed
        if order.task == "train":
            return batch_plan(
                shard,
                batch_size=training.batch_size,
                epochs=training.epochs,
                steps=training.steps,
                last=training.last_batch,
                smallest=smallest,
                seed=seed,
                round=order.round,
                client=client,
            )
        return batch_plan(
            shard,
            batch_size=training.batch_size,
            epochs=int(order.scalars.get("passes", 1)),
            smallest=smallest,
            seed=seed,
            round=order.round,
            client=client,
        )

    def _on_device(self, tensors: Tensors) -> Tensors:
        return {n: v.to(self.device) for n, v in tensors.items()} if self.device.type != "cpu" else tensors

    def train(self, order: Order, clients: Sequence[int], states: Sequence[ClientState]) -> BlockResult:
        """Carry out an order for a block of clients (ascending numbers), each with its private state."""
        spec, result = self.spec, BlockResult()
        lr = order.scalars.get("lr", None)
        if lr is None:
            t = spec.training
            lr = learning_rate(t.lr, t.schedule, order.round, spec.rounds, t.decay, t.decay_every)
        put = self._on_device
        order = replace(order, shared=put(order.shared), extra=put(order.extra), masks=put(order.masks))
        self.task.begin(order)
        smallest = self.task.smallest_batch
        block = []
        for client, state in zip(clients, states):
            plan, dropped = self._plan(order, client, smallest)
            result.dropped += dropped
            if not plan:
                reason = f"{len(spec.shards[client])} examples make no batch of at least {smallest}"
                result.failures.append(Failure(client, "train", reason))
                continue
            fetch = self.examples.fetcher(spec.seed, order.round, client, spec.training.augment)
            state = ClientState(self._on_device(state.private), self._on_device(state.memory))
            block.append(Work(client, state, plan, fetch))
        for group in [[w] for w in block] if spec.executor == "loop" else [block] if block else []:
            try:
                for outcome in EXECUTORS[spec.executor](self.task, order, group, float(lr)):
                    self._accept(order, outcome, result)
            except Exception as error:
                if spec.debug:
                    raise
                reason = f"{type(error).__name__}: {error}"
                done = {r.client for r in result.replies} | {f.client for f in result.failures}
                result.failures += [
                    Failure(w.client, "train", reason, traceback.format_exc()) for w in group if w.client not in done
                ]
        return result

    def _accept(self, order: Order, outcome: Outcome, result: BlockResult) -> None:
        client = outcome.client
        mean_loss = outcome.loss / max(outcome.seen, 1)
        report = {n: v.detach().cpu().clone() for n, v in outcome.report.items()}
        folded = {n: v for n, v in report.items() if n.startswith(FOLDED)}
        reason = refuse(outcome.shared, order.returned) or refuse_report(report)
        if reason is None and not np.isfinite(mean_loss):
            reason = f"the training loss is {mean_loss}"
        if reason is not None:
            result.failures.append(Failure(client, "update", reason))
            return
        examples = len(self.examples_of(order, client))
        shared = {n: v.cpu() for n, v in outcome.shared.items()}
        weight = float(examples) if order.weighting == "examples" else 1.0
        single: Tensors = {}
        if not order.fold:
            single = {n: v.clone() for n, v in shared.items()}
        else:
            report = {n: v for n, v in report.items() if n not in folded}
            if result.partial is None:
                result.partial = Partial.of({n: v.clone() for n, v in shared.items()} | folded, weight)
            else:
                result.partial.add(shared | folded, weight)
        metrics = {
            "loss": mean_loss,
            "accuracy": outcome.correct / max(outcome.seen, 1),
            "seen": float(outcome.seen),
        }
        result.replies.append(Reply(client, examples, single, report, metrics))
        to_cpu = lambda tree: {n: v.cpu() for n, v in tree.items()}  # noqa: E731
        if order.task != "score":
            result.states[client] = ClientState(to_cpu(outcome.state.private), to_cpu(outcome.state.memory))

    @torch.no_grad()
    def evaluate(self, shared: Tensors, jobs: Sequence[EvaluationJob]) -> list[Score]:
        """Accuracy and loss in evaluation mode."""
        model = self.task.model.eval()
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        scores = []
        for job in jobs:
            for name, value in {**shared, **job.private}.items():
                named[name].copy_(value)
            split = "train" if job.split == "validation" else "test"  # validation examples are held-out training ones
            hits, loss = 0.0, 0.0
            with self._predictor(job) as (predict, batches):
                for indices in batches:
                    x, y = self.examples.batch(split, indices)
                    output = predict(x)
                    logits = output[0] if isinstance(output, tuple) else output
                    hits += float(correct(logits, y))
                    loss += float(F.cross_entropy(logits.flatten(0, -2), y.flatten())) * len(y)
            scores.append(Score(job.client, job.domain, job.split, hits, loss, len(job.indices)))
        return scores

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
