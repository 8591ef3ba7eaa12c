"""One local step of one client: from the loss to new parameters.

``WholeGradients`` is for plug-ins that look at all gradients together. ``InBackward`` steps every parameter as soon as
backward has its gradient and frees it, so that one gradient is alive at a time: the memory of a tiny device, and the
same bits. ``FusedLinear`` is for SGD that no plug-in interferes with: neither the gradient of a wide layer nor, where
only a sum over clients is wanted, what a client makes of its weight is ever written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from fedsim.optim import SGD, Moments, Optimizer
from fedsim.plugin import Plugin
from fedsim.types import LowRank, Tensors, View
from fedsim.wide import WideLayer, holds


def transform(
    plugins: tuple[Plugin, ...], grads: Tensors, states: list[Tensors], params: Tensors, view: View
) -> tuple[Tensors, list[Tensors]]:
    """Pass gradients through every plug-in in turn."""
    after = []
    for plugin, state in zip(plugins, states):
        grads, state = plugin.update(grads, state, params, view)
        after.append(state)
    return grads, after


def gradients(params: Tensors, found: Iterable[Tensor | None]) -> Tensors:
    """What autograd found for ``params`` in turn, by name; zeros where the loss does not depend on a parameter."""
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(params.items(), found)}


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

    def start(self, view: View) -> None:
        """Begin a client."""
        for p in self.params.values():
            p.grad = None  # a client that failed in the middle of backward may have left one
        self.states = [p.start(self.params, view) for p in self.plugins]
        self.moments = self.optimizer.init(self.params)

    def step(self, loss: Tensor, view: View, count: int) -> None:
        found = torch.autograd.grad(loss, list(self.params.values()), allow_unused=True)
        self._apply(self.params, gradients(self.params, found), self.moments, view, count)

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


class FusedLinear(WholeGradients):
    """SGD without momentum where no plug-in asks for a gradient: the weights of big linear layers are ``WideLayer``s.
    One that has no room for factors is written after every step.

    The bits differ from the other ways by the rounding of g^T x and of W after each step, which are never done.
    """

    LEAST = 1 << 16  # weights: below, what it saves is less than the detour through Python

    def __init__(self, plugins: tuple[Plugin, ...], optimizer: Optimizer, params: Tensors, modules: list[nn.Linear]):
        super().__init__(plugins, optimizer, params)
        names = {id(p): n for n, p in params.items()}
        self._layers = {names[id(module.weight)]: WideLayer(module) for module in modules}
        self._rest = {n: p for n, p in params.items() if n not in self._layers}
        self._decay = optimizer.weight_decay
        self._unseen = unseen(plugins)
        for layer in self._layers.values():
            layer.module.forward = partial(_forward, layer)  # type: ignore[method-assign]

    @classmethod
    def layers(
        cls, model: nn.Module, plugins: tuple[Plugin, ...], optimizer: Optimizer, params: Tensors
    ) -> list[nn.Linear]:
        """The layers of ``model`` that may be stepped so."""
        if not isinstance(optimizer, SGD) or optimizer.momentum:
            return []
        if any(p.overrides("loss", "update", "project") for p in plugins):
            return []
        trained = {id(p) for p in params.values()}
        owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
        found = [m for m in model.modules() if type(m) is nn.Linear and m.weight.numel() >= cls.LEAST]
        return [m for m in found if id(m.weight) in trained and owners[id(m.weight)] == 1]

    def read(self, shared: Tensors) -> frozenset[str]:
        return frozenset(n for n in self._layers if n in shared) if self._unseen else frozenset()

    def start(self, view: View) -> None:
        super().start(view)
        read = self.read(view.order.shared)
        for name, layer in self._layers.items():
            layer.start(view.order.shared[name] if name in read else layer.module.weight)

    def step(self, loss: Tensor, view: View, count: int) -> None:
        # Autograd goes where somebody asks for a gradient, so it is asked for those that are None, too.
        found = dict(zip(self.params, torch.autograd.grad(loss, list(self.params.values()), allow_unused=True)))
        for layer in self._layers.values():
            rows = layer.end(view.lr)
            if self._decay:
                layer.write(1 - view.lr * self._decay)
            elif not holds(layer.base, rows * view.steps) and not view.last:
                layer.write()
        if self._rest:  # a model may be one wide layer
            grads = gradients(self._rest, map(found.get, self._rest))
            self._apply(self._rest, grads, self.moments, view, count)

    def finish(self, wanted: Container[str]) -> dict[str, LowRank | None]:
        given: dict[str, LowRank | None] = {}
        for name, layer in self._layers.items():
            factors = layer.clients[0].factors
            if self._unseen and name in wanted:
                own = layer.base is layer.module.weight  # it was written, as there was no room
                given[name] = None if own or not factors.bounded else factors
            if given.get(name) is None and not layer.written():
                layer.write()
        return given

    def close(self) -> None:
        for layer in self._layers.values():
            del layer.module.forward


def _forward(layer: WideLayer, x: Tensor) -> Tensor:
    (y,) = layer([x])
    return y.clone() if layer.module.bias is None else y + layer.module.bias


def unseen(plugins: tuple[Plugin, ...]) -> bool:
    """Whether nobody looks at the parameters but the model."""
    return not any(p.overrides("start", "finish") for p in plugins)


def stepper(
    model: nn.Module, plugins: tuple[Plugin, ...], optimizer: Optimizer, params: Tensors, *, fuse: bool = True
) -> WholeGradients:
    """Fused where nobody asks for gradients and a layer is big enough; the frugal way, which is a little slower, if a
    plug-in asks for it and none needs all gradients at once.

    Args:
        fuse: False under autocast, where what a layer sees is not of its weights' dtype.
    """
    if fuse and (layers := FusedLinear.layers(model, plugins, optimizer, params)):
        return FusedLinear(plugins, optimizer, params, layers)
    whole = any(p.overrides("update") and not p.per_tensor for p in plugins)
    frugal = any(p.frugal for p in plugins) and not whole
    return (InBackward if frugal else WholeGradients)(plugins, optimizer, params)
