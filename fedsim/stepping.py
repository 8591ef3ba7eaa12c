"""One local step of one client: from the loss to new parameters.

``WholeGradients`` is for plug-ins that look at all gradients together. ``InBackward`` steps every parameter as soon as
backward has its gradient and frees it, so that one gradient is alive at a time: the memory of a tiny device, and the
same bits. ``FusedLinear`` is for SGD that no plug-in interferes with: neither the gradient of a wide layer nor, where
only a sum over clients is wanted, what a client makes of its weight is ever written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.optim import SGD, Moments, Optimizer
from fedsim.plugin import Plugin
from fedsim.types import LowRank, Tensors, View

_ONEDNN = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight")
)


def transform(
    plugins: tuple[Plugin, ...], grads: Tensors, states: list[Tensors], params: Tensors, view: View
) -> tuple[Tensors, list[Tensors]]:
    """Pass gradients through every plug-in in turn."""
    after = []
    for plugin, state in zip(plugins, states):
        grads, state = plugin.update(grads, state, params, view)
        after.append(state)
    return grads, after


def project(plugins: tuple[Plugin, ...], params: Tensors, view: View) -> Tensors:
    for plugin in plugins:
        params = plugin.project(params, view)
    return params


class WholeGradients:
    """Steps ``params`` in place when all gradients are known."""

    def __init__(self, plugins: tuple[Plugin, ...], optimizer: Optimizer, params: Tensors):
        self.plugins, self.optimizer, self.params = plugins, optimizer, params
        self.states: list[Tensors] = []
        self.moments: Moments = {}

    def start(self, view: View, steps: int = 0, batch: int = 0) -> None:
        """Begin a client.

        Args:
            steps: of all clients that begin with the same tensors here, as far as is known.
            batch: examples of this client's first step.
        """
        for p in self.params.values():
            p.grad = None  # a client that failed in the middle of backward may have left one
        self.states = [p.start(self.params, view) for p in self.plugins]
        self.moments = self.optimizer.init(self.params)

    def step(self, loss: Tensor, view: View, count: int) -> None:
        found = torch.autograd.grad(loss, list(self.params.values()), allow_unused=True)
        grads = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(self.params.items(), found)}
        self._apply(self.params, grads, self.moments, view, count)

    @torch.no_grad()
    def _apply(self, params: Tensors, grads: Tensors, moments: Moments, view: View, count: int) -> None:
        grads, self.states = transform(self.plugins, grads, self.states, params, view)
        self.optimizer.step(params, grads, moments, view.lr, count)
        for name, value in project(self.plugins, params, view).items():
            if value is not params[name]:
                params[name].copy_(value)

    def read(self, shared: Tensors) -> frozenset[str]:
        """Names of the parameters that are read from ``shared`` and need no copy of it when a client starts."""
        return frozenset()

    def finish(self, wanted: Container[str]) -> dict[str, LowRank | None]:
        """After the last step: every parameter has its value, but for those ``wanted`` that are given as their
        difference from ``order.shared``. None: one of these that has its value nevertheless."""
        return {}

    def close(self) -> None:
        """Take off the model what was hung on it; the parameters keep their values."""


class InBackward(WholeGradients):
    """Steps each parameter inside ``backward``, by a hook that runs when its gradient is complete."""

    def __init__(self, plugins: tuple[Plugin, ...], optimizer: Optimizer, params: Tensors):
        super().__init__(plugins, optimizer, params)
        self._view: View | None = None
        self._count, self._done = 0, set[str]()
        self._hooks = [
            p.register_post_accumulate_grad_hook(partial(self._step_one, number, name))
            for number, (name, p) in enumerate(params.items())
        ]

    def step(self, loss: Tensor, view: View, count: int) -> None:
        self._view, self._count, self._done = view, count, set()
        loss.backward()
        for number, (name, p) in enumerate(self.params.items()):
            if name not in self._done:  # the loss does not depend on it: weight decay and the like still act
                p.grad = torch.zeros_like(p)
                self._step_one(number, name, p)

    def _step_one(self, number: int, name: str, param: Tensor) -> None:
        grad, param.grad = param.grad, None
        assert grad is not None
        assert self._view is not None
        moments = {m: [values[number]] for m, values in self.moments.items()}
        self._apply({name: param}, {name: grad}, moments, self._view, self._count)
        self._done.add(name)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _by_onednn(x: Tensor) -> bool:
    return _ONEDNN and x.device.type == "cpu" and x.dtype is torch.float32


def _thin(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b for few rows of x and a large W: a fifth to a quarter faster by oneDNN, where torch has it for the
    compiler's use, than by the BLAS, which repacks W first."""
    if _by_onednn(x):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


# By layer: where the base is that was packed last and for how many threads (oneDNN packs for them, and a sum's order
# may follow), the base, and what it and its transpose were packed to. Holding the base keeps its place in memory from
# being taken by another: in a Ray actor every block gets the round's tensors as new objects over the same memory.
_packed: WeakKeyDictionary[nn.Linear, tuple[tuple[int, int], Tensor, Tensor, Tensor]] = WeakKeyDictionary()


def _pack(module: nn.Linear, base: Tensor) -> tuple[Tensor, Tensor]:
    """``base`` in the orders in which oneDNN reads it for x W^T and for g W: a quarter to a half less time of each
    product, for some ten products' time."""
    known, key = _packed.get(module), (base.data_ptr(), torch.get_num_threads())
    if known is None or known[0] != key:
        _packed.pop(module, None)  # first, so that there are never two of them
        reorder = torch.ops.mkldnn._reorder_linear_weight
        _packed[module] = known = key, base, reorder(base), reorder(base.t())
    return known[2:]


class _Layer:
    """A linear layer whose SGD steps are kept as factors. After examples x_s with output gradients g_s its weight is

        W = base - lr sum_s g_s^T x_s = base + left^T right,    left [r, O], right [r, I], r examples

    so a product with W is one with ``base`` and two thin ones, and neither a gradient nor W need be written: a client's
    examples are few beside the rows and columns of a wide layer. Where they are not, W is written after every step.
    """

    def __init__(self, module: nn.Linear, weight_decay: float):
        self.module, self.weight_decay = module, weight_decay
        self.start(module.weight)
        module.forward = self.forward  # type: ignore[method-assign, assignment]

    def start(self, base: Tensor, pack: bool = False) -> None:
        """Begin a client whose weight is ``base``, which is only read unless it is the module's own.

        Args:
            pack: many steps are taken from this base.
        """
        self.base, self.left, self.right = base, base.new_empty(0, base.shape[0]), base.new_empty(0, base.shape[1])
        packed = pack and _by_onednn(base)
        self.straight, self.transposed = _pack(self.module, base) if packed else (base, base.t())
        self.seen = list[tuple[Tensor, Tensor]]()  # in this step: (gradients of the outputs, inputs)
        self.rows = 0  # of the last step

    def holds(self, examples: float | Tensor) -> bool:
        """Whether a client with so many is kept as factors: at most, they make products with W an eighth dearer."""
        outputs, inputs = self.module.weight.shape
        return bool(examples * 4 * (outputs + inputs) <= outputs * inputs)

    @property
    def params(self) -> list[Tensor]:
        return [p for p in (self.module.weight, self.module.bias) if p is not None]

    @property
    def written(self) -> bool:
        """Whether the module's own weight is the client's."""
        return self.base is self.module.weight and not len(self.left)

    def forward(self, x: Tensor) -> Tensor:
        # The parameters are arguments so that autograd comes by; they get their step, and no gradient.
        return _Wide.apply(x, self, *self.params)

    def product(self, x: Tensor) -> Tensor:
        """x [..., I] -> x W^T + b [..., O]"""
        y = _thin(x, self.straight, self.module.bias)
        return y + _thin(x, self.right) @ self.left if len(self.left) else y

    def back(self, gradient: Tensor) -> Tensor:
        """gradient [..., O] -> gradient W [..., I]"""
        x = _thin(gradient, self.transposed)
        return x + _thin(gradient, self.left) @ self.right if len(self.left) else x

    def end(self, lr: float) -> None:
        """After backward: the step. Every call of the layer has used W as it was."""
        keep = 1 - lr * self.weight_decay
        if self.module.bias is not None:
            self.module.bias.mul_(keep)
            for gradient, _ in self.seen:
                self.module.bias.add_(gradient.sum(0), alpha=-lr)
        self.rows = sum(len(gradient) for gradient, _ in self.seen)
        self.left = torch.cat([self.left, *(gradient * -lr for gradient, _ in self.seen)])
        self.right = torch.cat([self.right, *(x for _, x in self.seen)])
        self.seen = []
        if self.weight_decay:
            self.write(keep)

    def write(self, keep: float = 1.0) -> None:
        """W <- keep base + left^T right, in the module's own weight."""
        own = self.module.weight
        if self.base is not own:
            own.copy_(self.base)
        if len(self.left):
            own.addmm_(self.left.t(), self.right, beta=keep)
        elif keep != 1:
            own.mul_(keep)
        self.start(own)


class _Wide(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, layer: _Layer, *params: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        (x,) = ctx.saved_tensors
        back = ctx.layer.back(gradient) if ctx.needs_input_grad[0] else None
        ctx.layer.seen.append((gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])))
        return back, None, *(None for _ in ctx.layer.params)


class FusedLinear(WholeGradients):
    """SGD without momentum where no plug-in asks for a gradient: big linear layers are ``_Layer``s.

    The bits differ from the other ways by the rounding of g^T x and of W after each step, which are never done.
    """

    LEAST = 1 << 16  # weights: below, what it saves is less than the detour through Python
    MANY = 12  # steps of a block: with fewer, packing a weight for them does not pay

    def __init__(self, plugins: tuple[Plugin, ...], optimizer: SGD, params: Tensors, layers: list[nn.Linear]):
        super().__init__(plugins, optimizer, params)
        names = {id(p): n for n, p in params.items()}
        self._layers = {names[id(module.weight)]: _Layer(module, optimizer.weight_decay) for module in layers}
        stepped = {id(p) for layer in self._layers.values() for p in layer.params}
        self._rest = {n: p for n, p in params.items() if id(p) not in stepped}
        # Nobody looks at the parameters but the model.
        self._unseen = not any(p.overrides("start", "finish") for p in plugins)

    @classmethod
    def layers(cls, model: nn.Module, plugins: tuple[Plugin, ...], optimizer: SGD, params: Tensors) -> list[nn.Linear]:
        """The layers of ``model`` that may be stepped so."""
        if optimizer.momentum or any(p.overrides("loss", "update", "project") for p in plugins):
            return []
        trained = {id(p) for p in params.values()}
        owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
        found = [m for m in model.modules() if type(m) is nn.Linear and m.weight.numel() >= cls.LEAST]
        return [m for m in found if all(id(p) in trained and owners[id(p)] == 1 for p in m.parameters())]

    def read(self, shared: Tensors) -> frozenset[str]:
        return frozenset(n for n in self._layers if n in shared) if self._unseen else frozenset()

    def start(self, view: View, steps: int = 0, batch: int = 0) -> None:
        super().start(view)
        read = self.read(view.order.shared)
        for name, layer in self._layers.items():
            if name in read:
                layer.start(view.order.shared[name], pack=steps >= self.MANY and layer.holds(batch * view.steps))
            else:
                layer.start(layer.module.weight)

    def step(self, loss: Tensor, view: View, count: int) -> None:
        # Autograd goes where somebody asks for a gradient, so it is asked for those that are None, too.
        found = dict(zip(self.params, torch.autograd.grad(loss, list(self.params.values()), allow_unused=True)))
        with torch.no_grad():
            for layer in self._layers.values():
                layer.end(view.lr)
                if not layer.holds(layer.rows * view.steps) and not view.last:
                    layer.write()
        grads = {n: torch.zeros_like(p) if (g := found[n]) is None else g for n, p in self._rest.items()}
        if grads:  # a model may be one wide layer
            self._apply(self._rest, grads, self.moments, view, count)

    def finish(self, wanted: Container[str]) -> dict[str, LowRank | None]:
        given: dict[str, LowRank | None] = {}
        for name, layer in self._layers.items():
            factors = LowRank(layer.left, layer.right)
            if self._unseen and name in wanted:
                own = layer.base is layer.module.weight  # it was written, as there was no room
                given[name] = None if own or not factors.bounded else factors
            if given.get(name) is None and not layer.written:
                layer.write()
        return given

    def close(self) -> None:
        for layer in self._layers.values():
            del layer.module.forward


def stepper(
    model: nn.Module, plugins: tuple[Plugin, ...], optimizer: Optimizer, params: Tensors, *, fuse: bool = True
) -> WholeGradients:
    """Fused where nobody asks for gradients and a layer is big enough; the frugal way, which is a little slower, if a
    plug-in asks for it and none needs all gradients at once.

    Args:
        fuse: False under autocast, where what a layer sees is not of its weights' dtype.
    """
    if fuse and isinstance(optimizer, SGD) and (layers := FusedLinear.layers(model, plugins, optimizer, params)):
        return FusedLinear(plugins, optimizer, params, layers)
    whole = any(p.overrides("update") and not p.per_tensor for p in plugins)
    frugal = any(p.frugal for p in plugins) and not whole
    return (InBackward if frugal else WholeGradients)(plugins, optimizer, params)
