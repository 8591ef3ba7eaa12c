"""The loop for the clients of a block in lockstep: each takes its first step, then each its second, and so on.

A product of a batch of ten with a wide layer's weight takes as long as it takes to read the weight, and what it reads
pushes the convolutions' data out of the core's cache. In lockstep the layer is read once for the step of all: one
product of all their batches with the weight that they started from, and thin ones with what each has added
(``fedsim.wide``). Everything else a client does by itself, as in ``fedsim.local.run_loop``; the two differ by rounding
alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedsim.batches import BatchPlan
from fedsim.local import Block, ClientTask, Fetch, Outcomes
from fedsim.stepping import FusedLinear, gradients, unseen
from fedsim.types import LowRank, Order, Tensors
from fedsim.wide import WideLayer, holds

MOST = 8  # clients: beyond, nothing was measured
BYTES = 1 << 27  # that clients in lockstep may take: their activations wait for the others of their step
# Layers that draw no random numbers and have nothing but their tensors, so that clients may take turns with them.
PLAIN: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.Identity,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.GELU,
    nn.SiLU,
    nn.Tanh,
    nn.Sigmoid,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveAvgPool2d,
    nn.Flatten,
)
CALLED = ("forward", "__call__", "__iter__")  # what a kind of nn.Sequential must have as it is


@dataclass
class _Client:
    """Attributes:
    place: in the block.
    tensors: parameters and buffers of its own, which are all but the wide layers' weights.
    trained: those of them that local training changes.
    """

    place: int
    number: int
    plan: BatchPlan
    memory: Tensors
    tensors: Tensors
    trained: Tensors
    loss: Tensor
    correct: Tensor


class _Turns:
    """Layers that clients go through one after the other, each with its own tensors."""

    def __init__(self, layers: Sequence[tuple[str, nn.Module]]):
        self.layers = nn.Sequential(*(layer for _, layer in layers))
        self.names = {f"{i}.{n}": _join(path, n) for i, (path, layer) in enumerate(layers) for n in layer.state_dict()}

    def __call__(self, clients: Sequence[_Client], xs: Sequence[Tensor]) -> list[Tensor]:
        own = [{here: c.tensors[n] for here, n in self.names.items() if n in c.tensors} for c in clients]
        return [functional_call(self.layers, tensors, (x,)) for tensors, x in zip(own, xs)]


class _Together:
    """A wide layer, which clients go through side by side."""

    def __init__(self, path: str, module: nn.Linear):
        self.weight, self.bias = _join(path, "weight"), _join(path, "bias")
        self.layer = WideLayer(module)

    def __call__(self, clients: Sequence[_Client], xs: Sequence[Tensor]) -> list[Tensor]:
        ys = self.layer(xs, [c.place for c in clients])
        own = self.layer.module.bias  # where it is frozen
        return [y.clone() if own is None else y + c.tensors.get(self.bias, own) for y, c in zip(ys, clients)]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _layers(module: nn.Module, path: str = "") -> list[tuple[str, nn.Module]] | None:
    """The layers of nested ``nn.Sequential``s in the order in which they are called, with their paths; None of a model
    that is something else."""
    if "forward" in vars(module):
        return None
    if type(module) in PLAIN:
        return [(path, module)]
    own = any(getattr(type(module), name, None) is not getattr(nn.Sequential, name) for name in CALLED)
    if own or _hooked(module):
        return None
    found: list[tuple[str, nn.Module]] = []
    for name, child in module._modules.items():  # named_children() leaves out the second use of a module
        layers = _layers(child, _join(path, name)) if child is not None else None
        if layers is None:
            return None
        found += layers
    return found


def _hooked(module: nn.Module) -> bool:
    forward = module._forward_hooks or module._forward_pre_hooks
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)


def _wide(task: ClientTask, block: Block) -> list[nn.Linear]:
    """The wide layers if the clients of a block share their weights and need give none of them back as a tensor."""
    if not block.factors or task.precision == "bf16" or task.optimizer.weight_decay or not unseen(task.plugins):
        return []
    named: Tensors = dict(task.model.named_parameters())
    params = {n: named[n] for n in task.trainable}
    modules = FusedLinear.layers(task.model, task.plugins, task.optimizer, params)
    shared = {id(named[n]) for n in block.factors if n in named}
    rows = _rows(block)
    fit = (id(m.weight) in shared and holds(m.weight, rows) and not _hooked(m) for m in modules)
    return modules if all(fit) else []


def _rows(block: Block) -> int:
    """Examples that a client of the block takes its steps from, at most."""
    return max(plan.seen for _, plan in block.plans)


def _stages(task: ClientTask, block: Block) -> list[_Turns | _Together]:
    """The model as what clients do by turns and what they do together, in the order in which it is called; none if
    they cannot."""
    wide = {id(module) for module in _wide(task, block)}
    layers = _layers(task.model) if wide else None
    if layers is None:
        return []
    used = [id(p) for _, layer in layers for p in layer.parameters()]
    if not len(used) == len(set(used)) == len(list(task.model.parameters())):
        return []  # layers that share a parameter, or one that is no layer's
    stages, turns = list[_Turns | _Together](), list[tuple[str, nn.Module]]()
    vectors = False  # otherwise an example may be several rows to a wide layer
    for path, module in layers:
        if isinstance(module, nn.Flatten):
            vectors = (module.start_dim, module.end_dim) == (1, -1)
        if isinstance(module, nn.Linear) and id(module) in wide:
            if not vectors:
                return []
            stages += [_Turns(turns), _Together(path, module)]
            turns = []
        else:
            turns.append((path, module))
    return [*stages, _Turns(turns)]


def goes_in_lockstep(task: ClientTask, block: Block) -> bool:
    """Whether the clients of a block can be trained so: several of plain SGD that nobody interferes with, of whose
    wide layers only a sum is wanted, by a model that is a chain of well-known layers."""
    return len(block) > 1 and bool(_stages(task, block))


def abreast(task: ClientTask, block: Block, kept: int) -> int:
    """How many clients of a block that ``goes_in_lockstep`` are to go so at once: of model, batch and block alone, as
    bits may depend on it.

    Args:
        kept: bytes that autograd keeps of a client's forward pass.
    """
    weights = [module.weight for module in _wide(task, block)]
    own = sum(v.nbytes for v in task.model.state_dict().values()) - sum(w.nbytes for w in weights)
    factors = sum(_rows(block) * sum(w.shape) * w.element_size() for w in weights)
    return max(1, min(MOST, BYTES // (kept + 2 * own + factors)))  # twice: their gradients


def run_lockstep(task: ClientTask, order: Order, block: Block, lr: float, fetch: Fetch) -> Iterator[Outcomes]:
    """Same contract as ``fedsim.local.run_loop``, for a block that ``goes_in_lockstep``."""
    task.begin(order)
    stages = _stages(task, block)
    wide = [stage for stage in stages if isinstance(stage, _Together)]
    for each in wide:
        each.layer.start(order.shared[each.weight], len(block))
    clients = _clients(task, order, block, {each.weight for each in wide})
    for step in range(max(len(client.plan) for client in clients)):
        active = [client for client in clients if step < len(client.plan)]
        batches = [fetch([client.number], client.plan[step], step) for client in active]
        values = [x for (x,), _ in batches]
        for stage in stages:
            values = stage(active, values)
        losses = []
        for client, output, (_, (y,)) in zip(active, values, batches):
            loss, right = task.objective(output, y, client.trained, order, client.memory)
            losses.append(loss)
            client.loss += loss.detach() * len(y)
            client.correct += right
        # No client's loss depends on another's parameters, so the gradients of the sum are each one's own. Those of the
        # wide weights are None, and asked for so that autograd comes by.
        trained = [p for client in active for p in client.trained.values()]
        asked = [*trained, *(each.layer.module.weight for each in wide)]
        found = iter(torch.autograd.grad(torch.stack(losses).sum(), asked, allow_unused=True))
        with torch.no_grad():
            for client in active:
                if client.trained:  # a model may be one wide layer
                    grads = gradients(client.trained, found)
                    task.optimizer.step(client.trained, grads, {}, lr, step)
        for each in wide:
            each.layer.end(lr)
    for client in clients:
        yield _outcome(task, order, client, wide)


def _clients(task: ClientTask, order: Order, block: Block, wide: Collection[str]) -> list[_Client]:
    """The clients of a block before their first step."""
    like = {**dict(task.model.named_parameters()), **dict(task.model.named_buffers())}
    shared = {n: v for n, v in order.shared.items() if n not in wide}
    clients = []
    for place, (number, packed, plan) in enumerate(zip(block.clients, block.states, block.each_plan())):
        state = packed.unpack(task.device)
        tensors = {n: torch.empty_like(like[n]).copy_(v) for n, v in {**shared, **state.private}.items()}
        trained = {n: tensors[n].requires_grad_() for n in task.trainable if n in tensors}
        nothing = torch.zeros((), dtype=torch.float64), torch.zeros(())
        clients.append(_Client(place, number, plan, state.memory, tensors, trained, *nothing))
    return clients


def _outcome(task: ClientTask, order: Order, client: _Client, wide: Sequence[_Together]) -> Outcomes:
    factors: dict[str, LowRank | None] = {}
    ends = dict(client.tensors)
    for each in wide:
        update = each.layer.clients[client.place].factors
        factors[each.weight] = update if update.bounded else None
        if not update.bounded:
            ends[each.weight] = each.layer.base + update.left.t() @ update.right
    return Outcomes.of_one(
        client.number,
        ends,
        order.returned,
        task.private,
        client.memory,
        {},
        client.loss,
        client.correct,
        client.plan.seen,
        factors,
    )
