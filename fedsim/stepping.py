"""One local step of one client: from the loss to new parameters, in two ways with the same bits.

``InBackward`` steps every parameter as soon as backward has its gradient and frees it, so that one gradient is alive at
a time: the memory of a tiny device. ``WholeGradients`` is for plug-ins that look at all gradients together.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fedsim.optim import Moments, Optimizer
from fedsim.plugin import Plugin
from fedsim.types import Tensors, View


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

    def start(self, view: View) -> None:
        """Begin a client."""
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

    def close(self) -> None:
        """Leave the parameters as they were found."""


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


def stepper(plugins: tuple[Plugin, ...], optimizer: Optimizer, params: Tensors) -> WholeGradients:
    """The frugal way if a plug-in asks for it and none needs all gradients at once; it is a little slower."""
    whole = any(type(p).update is not Plugin.update and not p.per_tensor for p in plugins)
    frugal = any(p.frugal for p in plugins) and not whole
    return (InBackward if frugal else WholeGradients)(plugins, optimizer, params)
