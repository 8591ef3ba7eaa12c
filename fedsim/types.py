"""The nouns every other module speaks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Tensors = dict[str, Tensor]  # flat and named, never positional: state, update, mask, wire
FOLDED = "sum."  # prefix of report entries of the model's size: folded into a block's partial sums with the model


@dataclass(frozen=True)
class LowRank:
    """left^T right: what r examples have added to a matrix [O, I]; left [r, O], right [r, I]."""

    left: Tensor
    right: Tensor

    @property
    def bounded(self) -> bool:
        """Whether every entry of the product is surely finite, and so is its sum with any weight that is."""
        return bool(self.left.norm() * self.right.norm() < 1e30)


@dataclass(frozen=True)
class Order:
    """Server -> clients: one message of one round, the same for every client that gets it.

    Attributes:
        round: 1-based; a strategy's set-up rounds have numbers <= 0.
        task: what the client does: ``train`` (local training), ``statistics`` (forward passes in training
            mode, parameters unchanged) or ``score`` (loss in evaluation mode, nothing changed).
        shared: theta_t, the part of the model that is averaged.
        extra: whatever else the client half of the algorithm needs (masks, the previous global delta, ...).
        scalars: rates and switches.
        fold: the server needs only the weighted mean of the replies, so a worker may send partial sums.
        weighting: ``examples`` (n_k / n, McMahan et al. 2017) or ``uniform`` (1 / K).
        masks: name in ``shared`` -> bool tensor of its shape, False where the weight is pruned: zero here, on every
            client and in every reply. Messages carry only what a mask keeps.
        returns: names of the shared tensors that a reply carries; None: all of them.
    """

    round: int
    shared: Tensors
    task: str = "train"
    extra: Tensors = field(default_factory=dict)
    scalars: Mapping[str, float] = field(default_factory=dict)
    fold: bool = True
    weighting: str = "examples"
    masks: Tensors = field(default_factory=dict)
    returns: tuple[str, ...] | None = None

    @property
    def returned(self) -> Tensors:
        """The shared tensors whose new values a reply carries."""
        return self.shared if self.returns is None else {n: self.shared[n] for n in self.returns}


@dataclass(frozen=True)
class Reply:
    """Client -> server. ``report`` is what the plug-ins tell the server: small, except under ``FOLDED``."""

    client: int
    examples: int
    shared: Tensors
    report: Tensors = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ReplyColumns(Sequence[Reply]):
    """The replies of k clients in columns, tensors [k, ...]: a thousand small clients are no thousand objects. As a
    sequence it makes the single replies when they are asked for."""

    clients: list[int]
    examples: list[int]
    shared: Tensors
    report: Tensors
    metrics: Mapping[str, list[float]]

    def __len__(self) -> int:
        return len(self.clients)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        cut = lambda tree: {n: v[row] for n, v in tree.items()}  # noqa: E731
        metrics = {n: values[row] for n, values in self.metrics.items()}
        return Reply(self.clients[row], self.examples[row], cut(self.shared), cut(self.report), metrics)


@dataclass(frozen=True)
class ClientState:
    """What stays on a client between rounds: its private model tensors and its plug-ins' memory."""

    private: Tensors = field(default_factory=dict)
    memory: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class View:
    """What a plug-in may read inside a local step; the same object for loop and vmap.

    Attributes:
        order: the order being carried out (the same tensors for every client of a block).
        memory: this client's persisted plug-in memory.
        lr: the local learning rate of this round's schedule, before any plug-in adapts it.
        steps: number of local steps of this client in this round (a number, or a scalar tensor under vmap).
        aux: what the model returned beside its logits (an adapter's matching loss, ...).
        last: this is the client's last local step of the round; a plain bool, so a plug-in may branch on it.
        labels: of the batch, [B]; given to ``loss`` alone, for models that return more than one set of logits.
    """

    order: Order
    memory: Tensors
    lr: float = 0.0
    steps: float | Tensor = 1.0
    aux: Tensors = field(default_factory=dict)
    last: bool = False
    labels: Tensor | None = None
