"""One local step of one client: from the loss to new parameters.

``WholeGradients`` is for plug-ins that look at all gradients together. ``InBackward`` steps every parameter as soon as
backward has its gradient and frees it, so that one gradient is alive at a time: the memory of a tiny device, and the
same bits. ``FusedLinear`` is for SGD that no plug-in interferes with: the gradient of a big layer is never written.
"""

from __future__ import annotations

from collections import Counter
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.optim import SGD, Moments, Optimizer
from fedsim.plugin import Plugin
from fedsim.types import Tensors, View

_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


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


def _thin(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b for few rows of x and a large W: a fifth to a quarter faster by oneDNN, where torch has it for the
    compiler's use, than by the BLAS, which repacks W first."""
    if x.device.type == "cpu" and x.dtype is torch.float32 and _ONEDNN:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class _Layer:
    """A linear layer that takes its SGD step inside backward: W <- (1 - lr wd) W - lr g^T x as one matrix product.

    A layer called several times sums its gradients and takes the step afterwards: every call needs W as it was.
    """

    def __init__(self, module: nn.Linear, weight_decay: float):
        self.module, self.weight_decay = module, weight_decay
        self.calls, self.sums = 0, list[Tensor]()
        self.begin(0.0)
        module.forward = self.forward  # type: ignore[method-assign, assignment]

    def begin(self, lr: float) -> None:
        """Before backward."""
        self.lr, self.due = lr, True

    @property
    def params(self) -> list[Tensor]:
        return [p for p in (self.module.weight, self.module.bias) if p is not None]

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return F.linear(x, self.module.weight, self.module.bias)
        self.calls += 1
        # The parameters are arguments so that autograd comes by; they get their step, and no gradient.
        return _StepInBackward.apply(x, self, *self.params)

    def backward(self, x: Tensor, gradient: Tensor) -> None:
        """x [..., I] what came in, gradient [..., O] of what went out."""
        x, gradient = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        self.calls -= 1
        if not self.calls and not self.sums:
            keep = 1 - self.lr * self.weight_decay
            self.module.weight.addmm_(gradient.t(), x, beta=keep, alpha=-self.lr)
            if self.module.bias is not None:
                self.module.bias.mul_(keep).add_(gradient.sum(0), alpha=-self.lr)
            self.due = False
            return
        parts = [gradient.t() @ x, gradient.sum(0)][: len(self.params)]
        self.sums = [a.add_(b) for a, b in zip(self.sums, parts)] if self.sums else parts

    def end(self) -> None:
        """After backward: the step of a layer that was called several times, or that the loss does not depend on."""
        if self.due and self.weight_decay:
            for p in self.params:
                p.mul_(1 - self.lr * self.weight_decay)
        for p, total in zip(self.params, self.sums):
            p.add_(total, alpha=-self.lr)
        self.calls, self.sums = 0, []


class _StepInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, layer: _Layer, *params: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        ctx.layer = layer
        return _thin(x, *params)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        (x,) = ctx.saved_tensors
        back = _thin(gradient, ctx.layer.module.weight.t()) if ctx.needs_input_grad[0] else None
        ctx.layer.backward(x, gradient)
        return back, None, *(None for _ in ctx.layer.params)


class FusedLinear(WholeGradients):
    """SGD without momentum where no plug-in asks for a gradient: big linear layers are ``_Layer``s.

    For a layer of 13 M weights and batches of 32 this saves three of the eight times that a step moves them through
    memory. The bits differ from the other ways by the rounding of g^T x, which is never done.
    """

    LEAST = 1 << 16  # weights: below, what it saves is less than the detour through Python

    def __init__(self, plugins: tuple[Plugin, ...], optimizer: SGD, params: Tensors, layers: list[nn.Linear]):
        super().__init__(plugins, optimizer, params)
        self._layers = [_Layer(module, optimizer.weight_decay) for module in layers]
        stepped = {id(p) for layer in self._layers for p in layer.params}
        self._rest = {n: p for n, p in params.items() if id(p) not in stepped}

    @classmethod
    def layers(cls, model: nn.Module, plugins: tuple[Plugin, ...], optimizer: SGD, params: Tensors) -> list[nn.Linear]:
        """The layers of ``model`` that may be stepped so."""
        hooks = ("loss", "update", "project")
        if optimizer.momentum:
            return []
        if any(getattr(type(p), hook) is not getattr(Plugin, hook) for p in plugins for hook in hooks):
            return []
        trained = {id(p) for p in params.values()}
        owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
        found = [m for m in model.modules() if type(m) is nn.Linear and m.weight.numel() >= cls.LEAST]
        return [m for m in found if all(id(p) in trained and owners[id(p)] == 1 for p in m.parameters())]

    def start(self, view: View) -> None:
        super().start(view)
        for layer in self._layers:
            layer.calls, layer.sums = 0, []  # a client that failed in the middle of a step may have left some

    def step(self, loss: Tensor, view: View, count: int) -> None:
        for layer in self._layers:
            layer.begin(view.lr)
        # Autograd goes where somebody asks for a gradient, so it is asked for those that are None, too.
        found = dict(zip(self.params, torch.autograd.grad(loss, list(self.params.values()), allow_unused=True)))
        with torch.no_grad():
            for layer in self._layers:
                layer.end()
        grads = {n: torch.zeros_like(p) if (g := found[n]) is None else g for n, p in self._rest.items()}
        self._apply(self._rest, grads, self.moments, view, count)

    def close(self) -> None:
        for layer in self._layers:
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
    whole = any(type(p).update is not Plugin.update and not p.per_tensor for p in plugins)
    frugal = any(p.frugal for p in plugins) and not whole
    return (InBackward if frugal else WholeGradients)(plugins, optimizer, params)
