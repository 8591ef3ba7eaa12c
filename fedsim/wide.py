"""Wide linear layers whose SGD steps are kept as factors.

After examples x_s with output gradients g_s the weight of a client is

    W = base - lr sum_s g_s^T x_s = base + left^T right,    left [r, O], right [r, I], r examples

so a product with W is one with ``base``, which all clients share, and two thin ones. Neither a gradient nor W need be
written: a client's examples are few beside the rows and columns of a wide layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.types import LowRank

_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _thin(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T for few rows of x and a large W: a fifth to a quarter faster by oneDNN, where torch has it for the
    compiler's use, than by the BLAS, which repacks W first."""
    if _ONEDNN and x.device.type == "cpu" and x.dtype is torch.float32:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


def holds(weight: Tensor, rows: float | Tensor) -> bool:
    """Whether a client that takes its steps from so many is kept as factors: at most, they make products with its
    weight an eighth dearer."""
    outputs, inputs = weight.shape
    return bool(rows * 4 * (outputs + inputs) <= outputs * inputs)


class Steps:
    """left^T right: what a client's steps have added to the base."""

    def __init__(self, base: Tensor):
        self.left, self.right = base.new_empty(0, base.shape[0]), base.new_empty(0, base.shape[1])

    def __len__(self) -> int:
        """Examples."""
        return len(self.left)

    @property
    def factors(self) -> LowRank:
        return LowRank(self.left, self.right)

    def add(self, gradient: Tensor, x: Tensor, lr: float) -> None:
        self.left, self.right = torch.cat([self.left, gradient * -lr]), torch.cat([self.right, x])

    def forward(self, x: Tensor) -> Tensor:
        """x [R, I] -> x (left^T right)^T [R, O]"""
        return _thin(x, self.right) @ self.left

    def backward(self, gradient: Tensor) -> Tensor:
        """gradient [R, O] -> gradient (left^T right) [R, I]"""
        return _thin(gradient, self.left) @ self.right


class WideLayer:
    """The weight of a linear layer for clients that start from the same one. The bias is none of its business."""

    def __init__(self, module: nn.Linear):
        self.module = module
        self.start(module.weight)

    def start(self, base: Tensor, clients: int = 1) -> None:
        """Begin with clients whose weight is ``base``, which is only read unless it is the module's own."""
        self.base, self.clients = base, [Steps(base) for _ in range(clients)]
        # In this step: (clients, rows of each, gradients of the outputs, inputs)
        self.seen = list[tuple[Sequence[int], list[int], Tensor, Tensor]]()

    def __call__(self, xs: Sequence[Tensor], clients: Sequence[int] = (0,)) -> list[Tensor]:
        """x [..., I] -> x W^T [..., O] of each of these clients: the base is read once for all of them. They are views,
        in which autograd lets nobody work in place."""
        flat = [x.reshape(-1, x.shape[-1]) for x in xs]
        rows = [len(x) for x in flat]
        together = torch.cat(flat) if len(flat) > 1 else flat[0]
        # The weight is an argument so that autograd comes by; it gets its steps, and no gradient.
        y = _Product.apply(together, self, clients, rows, self.module.weight)
        return [part.reshape(*x.shape[:-1], -1) for x, part in zip(xs, y.split(rows))]

    @torch.no_grad()
    def end(self, lr: float) -> int:
        """After backward: the step, for which every call of the layer has used W as it was. Returns the number of rows
        that the last client has added."""
        rows = 0
        for clients, sizes, gradient, x in self.seen:
            for client, g, part in zip(clients, gradient.split(sizes), x.split(sizes)):
                self.clients[client].add(g, part, lr)
            rows += sizes[-1]
        self.seen = []
        return rows

    def written(self) -> bool:
        """Whether the module's own weight is the client's."""
        return self.base is self.module.weight and not len(self.clients[0])

    @torch.no_grad()
    def write(self, keep: float = 1.0) -> None:
        """W <- keep base + left^T right of the only client, in the module's own weight, from where it goes on."""
        own, (steps,) = self.module.weight, self.clients
        if self.base is not own:
            own.copy_(self.base)
        if len(steps):
            own.addmm_(steps.left.t(), steps.right, beta=keep)
        elif keep != 1:
            own.mul_(keep)
        self.start(own)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx, x: Tensor, layer: WideLayer, clients: Sequence[int], rows: list[int], weight: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.of = layer, clients, rows
        y = _thin(x, layer.base)
        for client, into, part in zip(clients, y.split(rows), x.split(rows)):
            if len(steps := layer.clients[client]):
                into += steps.forward(part)
        return y

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        (x,), (layer, clients, rows) = ctx.saved_tensors, ctx.of
        layer.seen.append((clients, rows, gradient, x))
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        back = _thin(gradient, layer.base.t())
        for client, into, part in zip(clients, back.split(rows), gradient.split(rows)):
            if len(steps := layer.clients[client]):
                into += steps.backward(part)
        return back, None, None, None, None
