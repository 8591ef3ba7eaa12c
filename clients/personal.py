"""Client halves of personalised methods: which part of the model a client keeps, and when each part trains.

The head is the last linear layer, found by type; in a model without one these methods make no sense.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.plugin import Plugin
from fedsim.types import Tensors, View

SHARED, PERSONAL, LOGITS, STEP = "shared.", "personal.", "personal-logits", "personal-step"


def head_names(model: nn.Module) -> set[str]:
    """Parameters of the last linear layer."""
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    inside = f"{linear[-1]}." if linear and linear[-1] else ""
    return {n for n in model.state_dict() if n.startswith(inside)} if linear else set()


class LocalHead(Plugin):
    """FedPer (Arivazhagan et al., 2019): the head stays on the client, body and head train together."""

    def __init__(self) -> None:
        self.head: frozenset[str] = frozenset()

    def private(self, model: nn.Module) -> set[str]:
        self.head = frozenset(head_names(model))
        return set(self.head)


class HeadThenBody(LocalHead):
    """FedRep (Collins et al., ICML 2021): the first ``share`` of a round's steps train the head alone, the others the
    body alone. A part at rest has gradient zero, which plain SGD leaves where it is."""

    def __init__(self, share: float):
        super().__init__()
        self.share = share

    def start(self, params: Tensors, view: View) -> Tensors:
        return {STEP: next(iter(params.values())).new_zeros(())}

    def update(self, grads: Tensors, state: Tensors, params: Tensors, view: View) -> tuple[Tensors, Tensors]:
        on_head = state[STEP] < self.share * view.steps
        rest = lambda n, g: torch.where(on_head == (n in self.head), g, torch.zeros_like(g))  # noqa: E731
        return {n: rest(n, g) for n, g in grads.items()}, {STEP: state[STEP] + 1}


class LateHead(LocalHead):
    """FedBABU (Oh, Kim, Yun, ICLR 2022): the head rests at its initial value, which is the same for all, while the
    body is learned; after round ``last`` the body rests and every client fits its own head."""

    def __init__(self, last: int):
        super().__init__()
        self.last = last

    def update(self, grads: Tensors, state: Tensors, params: Tensors, view: View) -> tuple[Tensors, Tensors]:
        late = view.order.round > self.last
        return {n: g if (n in self.head) == late else torch.zeros_like(g) for n, g in grads.items()}, state


class Twin(nn.Module):
    """Two models of one shape: the global one trains on the wire, the personal one beside it on the same batches.

    In training [B, ...] -> global logits, {personal logits}; in evaluation the personal logits alone.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.shared, self.personal = model, copy.deepcopy(model)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensors]:
        return (self.shared(x), {LOGITS: self.personal(x)}) if self.training else self.personal(x)


class PersonalTwin(Plugin):
    """Ditto (Li, Hu, Beirami, Smith, ICML 2021): beside the global step, v <- v - eta (grad F_k(v) + lambda (v - w)),
    with w as the server sent it. v is private to the client and is what it is evaluated with."""

    def __init__(self, strength: float):
        self.strength = strength

    def prepare(self, model: nn.Module) -> nn.Module:
        return Twin(model)

    def private(self, model: nn.Module) -> set[str]:
        return {n for n in model.state_dict() if n.startswith(PERSONAL)}

    def loss(self, loss: Tensor, params: Tensors, view: View) -> Tensor:
        if LOGITS not in view.aux:  # an order that scores the model
            return loss
        logits, y = view.aux[LOGITS], view.labels
        assert y is not None
        return loss + F.cross_entropy(logits.flatten(0, -2), y.flatten())

    def update(self, grads: Tensors, state: Tensors, params: Tensors, view: View) -> tuple[Tensors, Tensors]:
        w = view.order.shared
        near = {n: SHARED + n.removeprefix(PERSONAL) for n in grads if n.startswith(PERSONAL)}
        pull = lambda n: self.strength * (params[n] - w[near[n]])  # noqa: E731
        return {n: g + pull(n) if near.get(n) in w else g for n, g in grads.items()}, state
