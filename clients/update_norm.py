"""What a client's update weighs: ||w_k - w_t||^2 over the trained parameters that are shared, as FedExP needs it."""

from __future__ import annotations

import torch

from fedsim.plugin import Plugin
from fedsim.types import Tensors, View

NORM = "update-norm"  # in the report


class UpdateNorm(Plugin):
    def finish(self, params: Tensors, state: Tensors, view: View) -> tuple[Tensors, Tensors]:
        sent = view.order.shared
        squares = [(p - sent[n]).square().sum() for n, p in params.items() if n in sent]
        return {NORM: torch.stack(squares).sum()}, {}
