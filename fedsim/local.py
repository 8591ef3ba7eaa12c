"""One client's local work, closed over a model skeleton and the plug-ins, and the loop that runs it client by client.

``ClientTask`` says what happens at a step; executors (this loop, ``fedsim.lockstep``, ``fedsim.vectorized``) map it
over the clients of a block. All yield ``Outcomes`` in client order: loop and lockstep of one client each, vmap of many.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.batches import BatchPlan
from fedsim.models.norm import classify
from fedsim.models.norm_layers import EvoNormB0
from fedsim.optim import Optimizer
from fedsim.packing import Packed
from fedsim.plugin import Plugin
from fedsim.stepping import WholeGradients, stepper
from fedsim.types import LowRank, Order, Tensors, View

# (clients, the examples of each at a step [k, B], number of the step) -> inputs [k, B, ...], labels [k, B, ...]
Fetch = Callable[[Sequence[int], np.ndarray, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Block:
    """What the clients of a block do for one order.

    Attributes:
        clients: ascending.
        states: their private state, packed: an executor unpacks those that it trains at once.
        plans: (positions in ``clients`` [k], their steps); every position is in one of them.
        factors: shared tensors whose outcome may be left as ``Outcomes.factors``.
        alone: the whole block is one client, so nothing is trained after it that would write to its outcome.
    """

    clients: list[int]
    states: Sequence[Packed]
    plans: Sequence[tuple[np.ndarray, BatchPlan]]
    factors: Collection[str] = ()
    alone: bool = False

    def __len__(self) -> int:
        return len(self.clients)

    def each_plan(self) -> list[BatchPlan]:
        """The steps of every client by itself."""
        single = {p: BatchPlan(plan.order[i : i + 1], plan.layout) for ps, plan in self.plans for i, p in enumerate(ps)}
        return [single[position] for position in range(len(self))]

    def take(self, positions: Sequence[int]) -> Block:
        """The part of the block with the clients at ascending ``positions``."""
        plans = []
        for places, plan in self.plans:
            kept = np.isin(places, positions)
            if kept.any():
                plans.append((np.searchsorted(positions, places[kept]), BatchPlan(plan.order[kept], plan.layout)))
        clients, states = [self.clients[p] for p in positions], [self.states[p] for p in positions]
        return replace(self, clients=clients, states=states, plans=plans)


@dataclass
class Outcomes:
    """What k clients end with, in columns: each tensor is [k, ...].

    ``factors``: of a single client, instead of the tensors of these names: what to add to those of the order; None: it
    is a tensor of this client after all.
    Tensors may be buffers of the executor: use them before asking for the next.
    """

    clients: list[int]
    shared: Tensors
    private: Tensors
    memory: Tensors
    report: Tensors
    loss: Tensor  # float64 [k], summed over the examples seen
    correct: Tensor  # [k]
    seen: list[int]
    factors: Mapping[str, LowRank | None] = field(default_factory=dict)

    @classmethod
    def of_one(
        cls,
        client: int,
        ends: Tensors,
        returned: Collection[str],
        private: Collection[str],
        memory: Tensors,
        report: Tensors,
        loss: Tensor,
        correct: Tensor,
        seen: int,
        factors: Mapping[str, LowRank | None],
    ) -> Outcomes:
        """A single client's, from the tensors that it ends with (not a copy of them): ``returned`` are the names that
        the order asks for, ``loss`` and ``correct`` scalars."""
        row = lambda tree: {n: v.detach().contiguous().unsqueeze(0) for n, v in tree.items()}  # noqa: E731
        return cls(
            clients=[client],
            shared=row({n: ends[n] for n in returned if factors.get(n) is None}),
            private=row({n: ends[n] for n in sorted(private)}),
            memory=row(memory),
            report=row(report),
            loss=loss.reshape(1),
            correct=correct.reshape(1),
            seen=[seen],
            factors=factors,
        )

    def one(self, row: int) -> Outcomes:
        """The outcome of one client, as columns of length 1."""
        cut = lambda tree: {n: v[row : row + 1] for n, v in tree.items()}  # noqa: E731
        return Outcomes(
            [self.clients[row]],
            cut(self.shared),
            cut(self.private),
            cut(self.memory),
            cut(self.report),
            self.loss[row : row + 1],
            self.correct[row : row + 1],
            [self.seen[row]],
            self.factors,
        )


def correct(logits: Tensor, y: Tensor) -> Tensor:
    """Number of correct predictions; for sequences, the mean over positions of each example."""
    first = logits.detach().max(-1).indices  # argmax, in less time
    return (first == y).reshape(len(y), -1).float().mean(1).sum()


def score(output: Tensor | tuple[Tensor, Tensors], y: Tensor) -> tuple[Tensor, Tensor]:
    """(number of correct predictions, mean loss) of a model's output: logits [B, C] or [B, T, C], perhaps with more."""
    logits = output[0] if isinstance(output, tuple) else output
    return correct(logits, y), F.cross_entropy(logits.flatten(0, -2), y.flatten())


@dataclass(frozen=True)
class ClientTask:
    """Model skeleton, plug-ins and optimizer: everything of the local work but data and state.

    Attributes:
        precision: of products and convolutions while training: ``full``, ``tf32`` (a GPU's, set by the worker) or
            ``bf16`` (torch's autocast: parameters, gradients of parameters, normalization and loss stay as they are).
        compile: under vmap, run a step through torch's compiler.
        trainable: names of the parameters that local training changes, in the model's order.
        private: names that never leave the client.
        frozen: parameters that need no gradient: constants of the skeleton, never sent, averaged or stacked.
        kinds: every ``state_dict`` name -> weight, affine, stats, counter or buffer.
    """

    model: nn.Module
    plugins: tuple[Plugin, ...]
    optimizer: Optimizer
    precision: str = "full"
    compile: bool = False
    trainable: tuple[str, ...] = field(init=False)
    private: frozenset[str] = field(init=False)
    frozen: frozenset[str] = field(init=False)
    kinds: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        model = self.model
        for plugin in self.plugins:
            model = plugin.prepare(model)
        parameters = dict(model.named_parameters())
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731 (frozen dataclass)
        put("model", model.train())
        put("trainable", tuple(n for n, p in parameters.items() if p.requires_grad))
        put("frozen", frozenset(n for n, p in parameters.items() if not p.requires_grad))
        put("private", frozenset().union(*(p.private(model) for p in self.plugins)) - self.frozen)
        put("kinds", classify(model))

    def initial(self) -> tuple[Tensors, Tensors]:
        """(shared, private) tensors of the skeleton as it was initialised, the private ones in the order of replies."""
        state = {n: v.detach().clone() for n, v in self.model.state_dict().items() if n not in self.frozen}
        shared = {n: v for n, v in state.items() if n not in self.private}
        return shared, {n: state[n] for n in sorted(self.private)}

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def smallest_batch(self) -> int:
        """BatchNorm over vectors refuses a training batch of one example, and over images learns nothing from it."""
        norms = (nn.modules.batchnorm._BatchNorm, EvoNormB0)
        return 2 if any(isinstance(m, norms) and m.training for m in self.model.modules()) else 1

    def autocast(self) -> AbstractContextManager:
        """Around a forward pass of local training."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()

    def begin(self, order: Order) -> None:
        self.model.train(order.task != "score")
        for plugin in self.plugins:
            plugin.begin(self.model, order)

    def objective(
        self,
        output: Tensor | tuple[Tensor, Tensors],
        y: Tensor,
        params: Tensors,
        order: Order,
        memory: Tensors,
        cross_entropy: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    ) -> tuple[Tensor, Tensor]:
        """(mean loss of the batch with every plug-in's term, number of correct predictions)."""
        logits, aux = output if isinstance(output, tuple) else (output, {})
        logits = logits.float() if logits.dtype is torch.bfloat16 else logits
        # [B, C], or [B, T, C] of a language model
        loss = cross_entropy(logits.flatten(0, -2), y.flatten())
        view = View(order, memory, aux=aux, labels=y)
        for plugin in self.plugins:
            loss = plugin.loss(loss, params, view)
        return loss, correct(logits, y)

    def finish(self, params: Tensors, states: list[Tensors], view: View) -> tuple[Tensors, Tensors]:
        """(report, memory) of all plug-ins together, memory names prefixed with the plug-in's."""
        report: Tensors = {}
        memory: Tensors = dict(view.memory)
        for plugin, state in zip(self.plugins, states):
            told, kept = plugin.finish(params, state, view)
            report |= told
            memory |= kept
        return report, memory


def run_loop(task: ClientTask, order: Order, block: Block, lr: float, fetch: Fetch) -> Iterator[Outcomes]:
    """Client after client in the skeleton's own parameters: nothing of the model's size is allocated per client.

    An outcome's tensors are the skeleton's: they hold until the next client starts.
    """
    task.begin(order)
    model = task.model
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    params = {n: named[n] for n in task.trainable}
    stepping = stepper(model, task.plugins, task.optimizer, params, fuse=task.precision != "bf16")
    read = stepping.read(order.shared)
    try:
        for client, packed, plan in zip(block.clients, block.states, block.each_plan()):
            state = packed.unpack(task.device)
            with torch.no_grad():
                for name, value in {**order.shared, **state.private}.items():
                    if name not in read:
                        named[name].copy_(value)
            yield _train_one(task, order, client, state.memory, plan, stepping, lr, fetch, block)
    finally:
        stepping.close()


def _train_one(
    task: ClientTask,
    order: Order,
    client: int,
    memory: Tensors,
    plan: BatchPlan,
    stepping: WholeGradients,
    lr: float,
    fetch: Fetch,
    block: Block,
) -> Outcomes:
    params, steps = stepping.params, len(plan)
    view = View(order, memory, lr, float(steps))
    stepping.start(view)
    loss_sum = torch.zeros((), dtype=torch.float64, device=task.device)
    hits = torch.zeros((), device=task.device)
    for step in range(steps):
        (x,), (y,) = fetch([client], plan[step], step)
        with torch.set_grad_enabled(order.task == "train"):
            with task.autocast():
                output = task.model(x)
            loss, right = task.objective(output, y, params, order, memory)
        if order.task == "train":
            stepping.step(loss, replace(view, last=step + 1 == steps), step)
        loss_sum += loss.detach() * len(y)
        hits += right
    with torch.no_grad():
        factors = stepping.finish(block.factors)
        report, memory = task.finish(params, stepping.states, view)
    ends = task.model.state_dict()
    return Outcomes.of_one(
        client, ends, order.returned, task.private, memory, report, loss_sum, hits, plan.seen, factors
    )
