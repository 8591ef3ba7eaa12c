"""The vmap executor: the clients of a block as one batched computation over stacked tensors.

At each step the clients are grouped by the size of their batch (and those at their last step apart), so that a ragged
block is exact: no example and no step is padded, and no padding can enter a batch statistic. In the usual case there
is one group, the whole block. A step in which no plug-in has a part (``begin``, ``loss``, ``update``) is the same in
every round, and is replayed (``fedsim.replay``).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from fedsim.local import Block, ClientTask, Fetch, Outcomes, score
from fedsim.optim import Moments
from fedsim.packing import columns
from fedsim.replay import Replay
from fedsim.stepping import project, transform
from fedsim.types import Order, Tensors, View


@dataclass
class _Stack:
    """Everything of K clients, stacked: each tensor is [K, ...]."""

    params: Tensors
    buffers: Tensors
    memory: Tensors
    steps: Tensor
    states: list[Tensors]
    moments: Moments

    def take(self, rows: Tensor) -> _Stack:
        pick = lambda tree: {n: v.index_select(0, rows) for n, v in tree.items()}  # noqa: E731
        moments = {m: [v.index_select(0, rows) for v in vs] for m, vs in self.moments.items()}
        return _Stack(
            pick(self.params),
            pick(self.buffers),
            pick(self.memory),
            self.steps.index_select(0, rows),
            [pick(s) for s in self.states],
            moments,
        )

    def put(self, rows: Tensor, part: _Stack) -> None:
        trees = [(self.params, part.params), (self.buffers, part.buffers), *zip(self.states, part.states)]
        for mine, theirs in trees:
            for name, value in theirs.items():
                mine[name] = mine[name].index_copy(0, rows, value)
        for name, values in part.moments.items():
            for mine_v, value in zip(self.moments[name], values):
                mine_v.index_copy_(0, rows, value)


def run_vmap(task: ClientTask, order: Order, block: Block, lr: float, fetch: Fetch) -> Iterator[Outcomes]:
    """Same contract as ``fedsim.local.run_loop``.

    Clients whose plug-in memory has other names (one that trains for the first time has none) form stacks of
    their own, since a stacked tensor needs every client.
    """
    task.begin(order)
    alike: dict[bytes, list[int]] = {}
    for position, state in enumerate(block.states):
        alike.setdefault(state.layout.head, []).append(position)
    with _one_dtype_for_batch_norm(task):
        if len(alike) == 1:
            yield _run_alike(task, order, block, lr, fetch)
            return
        parts = [_run_alike(task, order, block.take(positions), lr, fetch) for positions in alike.values()]
    rows = {client: (part, row) for part in parts for row, client in enumerate(part.clients)}
    for client in block.clients:
        part, row = rows[client]
        yield part.one(row)


@contextmanager
def _one_dtype_for_batch_norm(task: ClientTask) -> Iterator[None]:
    """Under autocast BatchNorm gets bf16 and has float32 weights, which torch's rule for vmap does not take."""
    norms = [m for m in task.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    widen = lambda module, args: (args[0].float(), *args[1:])  # noqa: E731
    hooks = [m.register_forward_pre_hook(widen) for m in norms if task.precision == "bf16"]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _start(task: ClientTask, order: Order, block: Block, lr: float) -> _Stack:
    k = len(block)
    private, memory = columns(block.states, task.device)
    # Normalization writes its buffers in place, so every state tensor is batched, shared ones too.
    shared = {n: v.expand(k, *v.shape).clone() for n, v in order.shared.items()}
    state = {**shared, **private}
    params = {n: state.pop(n) for n in task.trainable}
    steps = torch.empty(k)
    for positions, plan in block.plans:
        steps[positions] = float(len(plan))
    steps = steps.to(task.device)
    begin = lambda p, m, k: [plugin.start(p, View(order, m, lr, k)) for plugin in task.plugins]  # noqa: E731
    states = vmap(begin)(params, memory, steps) if task.plugins else []
    states = [{n: v.clone() for n, v in s.items()} for s in states]
    return _Stack(params, state, memory, steps, states, task.optimizer.init(params))


def _run_alike(task: ClientTask, order: Order, block: Block, lr: float, fetch: Fetch) -> Outcomes:
    carry = _start(task, order, block, lr)
    k = len(block)
    loss, right = torch.zeros(k, dtype=torch.float64, device=task.device), torch.zeros(k, device=task.device)
    for step, rows, indices, last in _schedule(block):
        x, y = fetch([block.clients[row] for row in rows], indices, step)  # [k, B, ...]
        chosen = torch.as_tensor(rows, device=task.device)
        part = carry if len(rows) == k else carry.take(chosen)
        part_loss, part_right = _step(task, order, part, x, y, lr, step, last)
        if part is not carry:
            carry.put(chosen, part)
        loss.index_add_(0, chosen, part_loss.double() * indices.shape[1])
        right.index_add_(0, chosen, part_right)
    report: Tensors = {}
    memory = carry.memory
    if task.plugins:
        end = lambda p, s, m, k: task.finish(p, s, View(order, m, lr, k))  # noqa: E731
        report, memory = vmap(end)(carry.params, carry.states, carry.memory, carry.steps)
    state = {**carry.params, **carry.buffers}
    seen = np.empty(k, np.int64)
    for positions, plan in block.plans:
        seen[positions] = plan.seen
    return Outcomes(
        clients=block.clients,
        shared={n: state[n] for n in order.returned},
        private={n: state[n] for n in sorted(task.private)},
        memory=memory,
        report=report,
        loss=loss,
        correct=right,
        seen=seen.tolist(),
    )


def _schedule(block: Block) -> Iterator[tuple[int, np.ndarray, np.ndarray, bool]]:
    """(step, positions of the clients that are alike at it, their examples [k, B], whether it is their last step)."""
    for step in range(max(len(plan) for _, plan in block.plans)):
        alike: dict[tuple[int, bool], list[tuple[np.ndarray, np.ndarray]]] = {}
        for positions, plan in block.plans:
            if step < len(plan):
                indices = plan[step]
                alike.setdefault((indices.shape[1], step + 1 == len(plan)), []).append((positions, indices))
        for (_, last), members in alike.items():
            positions, indices = (np.concatenate(column) for column in zip(*members))
            ascending = np.argsort(positions)
            yield step, positions[ascending], indices[ascending], last


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Mean over the rows of logits [N, C], as torch's, which goes row by row and takes three times as long for the many
    short rows of a whole block."""
    below = logits - logits.detach().amax(-1, keepdim=True)
    return (below.exp().sum(-1).log() - below.gather(-1, y.unsqueeze(-1)).squeeze(-1)).mean()


def _batched(
    task: ClientTask, order: Order, lr: float, last: bool, *columns: Any
) -> tuple[Tensors, list[Tensors], Tensors, Tensor, Tensor]:
    """Forward and backward of one step of K clients, all of it [K, ...]: gradients, the plug-ins' states, buffers, loss
    and number of correct predictions.

    Args:
        columns: what ``one`` takes, each with the clients in front.
    """

    def forward(params: Tensors, buffers: Tensors, memory: Tensors, x: Tensor, y: Tensor):
        buffers = {n: v.clone() for n, v in buffers.items()}  # written in place by normalization layers
        with task.autocast():
            output = functional_call(task.model, {**params, **buffers}, (x,))
        loss, right = task.objective(output, y, params, order, memory, _cross_entropy)
        return loss, (buffers, right)

    def one(
        params: Tensors,
        buffers: Tensors,
        memory: Tensors,
        steps: Tensor,
        states: list[Tensors],
        x: Tensor,
        y: Tensor,
    ):
        if order.task != "train":
            loss, (buffers, right) = forward(params, buffers, memory, x, y)
            return {}, states, buffers, loss, right
        grads, (loss, (buffers, right)) = grad_and_value(forward, has_aux=True)(params, buffers, memory, x, y)
        grads, states = transform(task.plugins, grads, states, params, View(order, memory, lr, steps, last=last))
        return grads, states, buffers, loss, right

    with torch.set_grad_enabled(order.task == "train"):
        return vmap(one, randomness="different")(*columns)


_replays: WeakKeyDictionary[nn.Module, Replay] = WeakKeyDictionary()  # of the steps of a model


@functools.cache
def _compiled() -> Callable:
    """``_batched`` through torch's compiler, which fuses what is elementwise; made anew for each shape it meets."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no processes of its own that outlive a worker
    return torch.compile(_batched, dynamic=False)


def _step(
    task: ClientTask, order: Order, stack: _Stack, x: Tensor, y: Tensor, lr: float, step: int, last: bool
) -> tuple[Tensor, Tensor]:
    """One local step of every client of ``stack``, which is updated. x [K, B, ...], y [K, B] -> [K], [K]."""
    do: Callable = functools.partial(_batched, task, order, lr, last)
    if order.task == "train" and task.compile:
        do = functools.partial(_compiled(), task, order, lr, last)
    elif order.task == "train" and not any(p.overrides("begin", "loss", "update") for p in task.plugins):
        # Nothing in it depends on the order, so it is the same step in every round.
        do = functools.partial(_replays.setdefault(task.model, Replay()), do)
    grads, stack.states, stack.buffers, loss, right = do(
        stack.params, stack.buffers, stack.memory, stack.steps, stack.states, x, y
    )
    if order.task == "train":
        task.optimizer.step(stack.params, grads, stack.moments, lr, step)
        if any(p.overrides("project") for p in task.plugins):
            onto = lambda p, m: dict(project(task.plugins, p, View(order, m, lr)))  # noqa: E731
            stack.params = vmap(onto)(stack.params, stack.memory)
    return loss.detach(), right


def stacks_models(task: ClientTask, device: str) -> bool:
    """Whether scoring the clients' models at once is faster than one after the other.

    On a CPU only if what is private comes after the last convolution: everything before it is then computed once for
    all clients, while a stack of convolutions, or of normalizations between them, is slower than a loop over it.
    """
    if device != "cpu":
        return bool(task.private)
    conv = torch.nn.modules.conv._ConvNd
    convolutions = tuple(f"{path}." for path, m in task.model.named_modules() if isinstance(m, conv))
    names = list(task.model.state_dict())
    last = max((i for i, n in enumerate(names) if n.startswith(convolutions)), default=-1) if convolutions else -1
    return bool(task.private) and all(names.index(n) > last for n in task.private)


def score_stacked(
    task: ClientTask, shared: Tensors, private: Tensors, batches: Iterable[tuple[Tensor, Tensor]]
) -> tuple[list[float], list[float]]:
    """K models that differ in ``private`` [K, ...] on the same batches: correct predictions [K] and summed loss [K]."""
    k = len(next(iter(private.values())))
    hits, loss = torch.zeros(k, device=task.device), torch.zeros(k, dtype=torch.float64, device=task.device)
    for x, y in batches:

        def one(own: Tensors, x: Tensor = x, y: Tensor = y) -> tuple[Tensor, Tensor]:
            return score(functional_call(task.model, {**shared, **own}, (x,)), y)

        right, mean = vmap(one)(private)
        hits += right
        loss += mean.double() * len(y)
    return hits.tolist(), loss.tolist()
