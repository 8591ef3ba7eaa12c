"""The client half of pruning: train what the mask keeps, and tell the server where the loss wants a weight back.

The masks come with the order. Scalars of an order ask for a report (FedTiny's progressive pruning, Huang et al., ICDCS
2023; PruneFL, Jiang et al., TNNLS 2022):

    grow.NAME = a     at the last local step, before it: the a pruned positions of NAME with the largest gradients
    squares = 1       the mean over the local steps of the squared gradient of every position, dense
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedsim.plugin import Plugin
from fedsim.types import Tensors, View

GROW, SQUARES = "grow.", "squares"
INDEX, VALUE, SQUARE = "grow-index.", "grow-value.", "square."  # in the plug-in's state and report


class MaskedTraining(Plugin):
    """Gradients and weights stay zero where the order's masks prune.

    Frugal: with the loop executor the dense gradient of one layer at a time is alive, and of it the ``a`` largest
    entries are kept: O(a) memory, as FedTiny promises.
    """

    per_tensor = True
    frugal = True

    def start(self, params: Tensors, view: View) -> Tensors:
        state: Tensors = {}
        for name in view.order.masks:
            count = self._wanted(name, view)
            if count:
                zeros = params[name].new_zeros(count)
                state |= {INDEX + name: zeros.int(), VALUE + name: zeros}
            if SQUARES in view.order.scalars:
                state[SQUARE + name] = torch.zeros_like(params[name])
        return state

    def _wanted(self, name: str, view: View) -> int:
        return int(view.order.scalars.get(GROW + name, 0))

    def update(self, grads: Tensors, state: Tensors, params: Tensors, view: View) -> tuple[Tensors, Tensors]:
        masks, out = view.order.masks, dict(state)
        for name in grads.keys() & masks.keys():
            count = self._wanted(name, view)
            if count and view.last:
                out[INDEX + name], out[VALUE + name] = largest_pruned(grads[name], masks[name], count)
            if SQUARE + name in out:
                out[SQUARE + name] = out[SQUARE + name] + grads[name].square() / view.steps
        return {n: torch.where(masks[n], g, 0) if n in masks else g for n, g in grads.items()}, out

    def project(self, params: Tensors, view: View) -> Tensors:
        masks = view.order.masks
        return {n: torch.where(masks[n], p, 0) if n in masks else p for n, p in params.items()}

    def finish(self, params: Tensors, state: Tensors, view: View) -> tuple[Tensors, Tensors]:
        return state, {}


def largest_pruned(grad: Tensor, mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(flat positions int32 [count], gradients [count]) of the largest |gradient| where the mask prunes."""
    pruned = torch.where(mask, 0, grad).reshape(-1)
    index = pruned.abs().topk(count).indices
    return index.int(), pruned.gather(0, index)
