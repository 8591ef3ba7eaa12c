"""The vmap executor: the clients of a block as one batched computation over stacked tensors.

At each step the clients are grouped by the size of their batch (and those at their last step apart), so that a ragged
block is exact: no example and no step is padded, and no padding can enter a batch statistic. In the usual case there
is one group, the whole block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap

from fedsim.local import ClientTask, Outcome, Work
from fedsim.optim import Moments
from fedsim.plugin import Plugin
from fedsim.stepping import project, transform
from fedsim.types import ClientState, Order, Tensors, View


@dataclass
class _Block:
    """Everything of K clients, stacked: each tensor is [K, ...]."""

    params: Tensors
    buffers: Tensors
    memory: Tensors
    steps: Tensor
    states: list[Tensors]
    moments: Moments

    def take(self, rows: Tensor) -> _Block:
        pick = lambda tree: {n: v.index_select(0, rows) for n, v in tree.items()}  # noqa: E731
        moments = {m: [v.index_select(0, rows) for v in vs] for m, vs in self.moments.items()}
        return _Block(
            pick(self.params),
            pick(self.buffers),
            pick(self.memory),
            self.steps.index_select(0, rows),
            [pick(s) for s in self.states],
            moments,
        )

    def put(self, rows: Tensor, part: _Block) -> None:
        trees = [(self.params, part.params), (self.buffers, part.buffers), *zip(self.states, part.states)]
        for mine, theirs in trees:
            for name, value in theirs.items():
                mine[name] = mine[name].index_copy(0, rows, value)
        for name, values in part.moments.items():
            for mine_v, value in zip(self.moments[name], values):
                mine_v.index_copy_(0, rows, value)


def stack(trees: Sequence[Tensors]) -> Tensors:
    """K dicts of [...] -> one dict of [K, ...].

    Raises:
        KeyError: the dicts do not hold the same names.
    """
    return {n: torch.stack([t[n] for t in trees]) for n in trees[0]}


def run_vmap(task: ClientTask, order: Order, block: Sequence[Work], lr: float) -> Iterator[Outcome]:
    """Same contract as ``fedsim.local.run_loop``.

    Clients whose plug-in memory has other names (one that trains for the first time has none) form blocks of
    their own, since a stacked tensor needs every client.
    """
    task.begin(order)
    outcomes: dict[int, Outcome] = {}
    alike: dict[tuple[str, ...], list[Work]] = {}
    for work in block:
        alike.setdefault(tuple(sorted(work.state.memory)), []).append(work)
    for group in alike.values():
        for outcome in _run_alike(task, order, group, lr):
            outcomes[outcome.client] = outcome
    yield from (outcomes[work.client] for work in block)


def _start(task: ClientTask, order: Order, group: Sequence[Work], lr: float) -> _Block:
    k = len(group)
    private, memory = stack([w.state.private for w in group]), stack([w.state.memory for w in group])
    # Normalization writes its buffers in place, so every state tensor is batched, shared ones too.
    shared = {n: v.expand(k, *v.shape).clone() for n, v in order.shared.items()}
    state = {**shared, **private}
    params = {n: state.pop(n) for n in task.trainable}
    steps = torch.tensor([float(len(w.plan)) for w in group])
    begin = lambda p, m, k: [plugin.start(p, View(order, m, lr, k)) for plugin in task.plugins]  # noqa: E731
    states = vmap(begin)(params, memory, steps)
    states = [{n: v.clone() for n, v in s.items()} for s in states]
    return _Block(params, state, memory, steps, states, task.optimizer.init(params))


def _run_alike(task: ClientTask, order: Order, group: Sequence[Work], lr: float) -> Iterator[Outcome]:
    carry = _start(task, order, group, lr)
    k = len(group)
    loss, right = torch.zeros(k, dtype=torch.float64), torch.zeros(k)
    seen = [0] * k
    for step in range(max((len(w.plan) for w in group), default=0)):
        alike: dict[tuple[int, bool], list[int]] = {}
        for i, work in enumerate(group):
            if step < len(work.plan):
                alike.setdefault((len(work.plan[step]), step + 1 == len(work.plan)), []).append(i)
        for (size, last), members in alike.items():
            fetched = [group[i].fetch(group[i].plan[step], step) for i in members]
            x, y = torch.stack([x for x, _ in fetched]), torch.stack([y for _, y in fetched])  # [k, B, ...]
            rows = torch.tensor(members)
            part = carry if len(members) == k else carry.take(rows)
            part_loss, part_right = _step(task, order, part, x, y, lr, step, last)
            if part is not carry:
                carry.put(rows, part)
            loss.index_add_(0, rows, part_loss.double() * size)
            right.index_add_(0, rows, part_right)
            for i in members:
                seen[i] += size
    end = lambda p, s, m, k: task.finish(p, s, View(order, m, lr, k))  # noqa: E731
    report, memory = vmap(end)(carry.params, carry.states, carry.memory, carry.steps)
    row = lambda tree, i: {n: v[i] for n, v in tree.items()}  # noqa: E731
    for i, work in enumerate(group):
        state = row({**carry.params, **carry.buffers}, i)
        private = {n: state[n].clone() for n in sorted(task.private)}
        kept = {n: v.clone() for n, v in row(memory, i).items()}
        shared, told = {n: state[n] for n in order.returned}, row(report, i)
        yield Outcome(work.client, shared, ClientState(private, kept), told, float(loss[i]), float(right[i]), seen[i])


def _step(
    task: ClientTask, order: Order, block: _Block, x: Tensor, y: Tensor, lr: float, step: int, last: bool
) -> tuple[Tensor, Tensor]:
    """One local step of every client of ``block``, which is updated. x [K, B, ...], y [K, B] -> [K], [K]."""

    def forward(params: Tensors, buffers: Tensors, memory: Tensors, x: Tensor, y: Tensor):
        buffers = {n: v.clone() for n, v in buffers.items()}  # written in place by normalization layers
        output = functional_call(task.model, {**params, **buffers}, (x,))
        loss, right = task.objective(output, y, params, order, memory)
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
        grads, block.states, block.buffers, loss, right = vmap(one, randomness="different")(
            block.params, block.buffers, block.memory, block.steps, block.states, x, y
        )
    if order.task == "train":
        task.optimizer.step(block.params, grads, block.moments, lr, step)
        if any(type(p).project is not Plugin.project for p in task.plugins):
            onto = lambda p, m: dict(project(task.plugins, p, View(order, m, lr)))  # noqa: E731
            block.params = vmap(onto)(block.params, block.memory)
    return loss.detach(), right
