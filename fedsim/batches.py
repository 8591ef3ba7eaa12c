"""Which examples a client sees at each local step: a pure function of (seed, round, client)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from fedsim.random import generators


@dataclass(frozen=True)
class Layout:
    """How the examples of ``epochs`` epochs, one after the other, are cut into steps: the same for equal shards.

    Attributes:
        cuts: (start, stop) of each step's batch.
        dropped: examples that no step sees.
    """

    epochs: int
    cuts: tuple[tuple[int, int], ...]
    dropped: int


@cache
def layout(
    examples: int, *, batch_size: int, epochs: int = 1, steps: int = 0, last: str = "keep", smallest: int = 1
) -> Layout:
    """Cut epochs of ``examples`` examples into batches.

    Args:
        steps: so many steps (over as many epochs as that takes) instead of ``epochs``.
        last: ``keep`` the smaller batch at the end of an epoch or ``drop`` it. A shard smaller than one batch is
            always kept: a client that holds data trains.
        smallest: batches below this size are dropped whatever ``last`` says: BatchNorm in training mode
            refuses a batch of one.
    """
    cuts: list[tuple[int, int]] = []
    dropped, epoch = 0, 0
    while epoch < epochs if not steps else len(cuts) < steps:
        first = epoch * examples
        for start in range(0, examples, batch_size):
            size = min(batch_size, examples - start)
            if size < smallest or (size < batch_size and last == "drop" and start > 0):
                dropped += size
            else:
                cuts.append((first + start, first + start + size))
        epoch += 1
        if not cuts:
            break  # nothing trainable in this shard: the caller reports it
    return Layout(epoch, tuple(cuts[:steps] if steps else cuts), dropped)


@dataclass(frozen=True)
class BatchPlan:
    """The local steps of k clients with equally many examples: at step s they see ``order[:, start:stop]`` of cut s.

    Attributes:
        order: int64 [k, epochs * n], each client's examples in the order in which it sees them.
    """

    order: np.ndarray
    layout: Layout

    def __len__(self) -> int:
        return len(self.layout.cuts)

    def __getitem__(self, step: int) -> np.ndarray:
        """int64 [k, B]."""
        start, stop = self.layout.cuts[step]
        return self.order[:, start:stop]

    @property
    def seen(self) -> int:
        """Examples that each client sees."""
        return sum(stop - start for start, stop in self.layout.cuts)


def batch_plan(
    indices: np.ndarray,
    clients: Sequence[int] = (0,),
    *,
    batch_size: int,
    epochs: int = 1,
    steps: int = 0,
    shuffle: bool = True,
    last: str = "keep",
    smallest: int = 1,
    seed: int = 0,
    round: int = 0,
) -> BatchPlan:
    """Shuffle shards of one size (int64 [k, n]) anew for every epoch and cut them into batches, as ``layout`` says.

    Args:
        shuffle: False takes the examples in the order of ``indices`` in every epoch.
    """
    k, n = indices.shape
    cut = layout(n, batch_size=batch_size, epochs=epochs, steps=steps, last=last, smallest=smallest)
    if not shuffle:
        return BatchPlan(np.tile(indices, (1, cut.epochs)), cut)
    order = np.empty((k, cut.epochs * n), np.int64)
    for row, draw in enumerate(generators(seed, clients, round=round, purpose="batches")):
        for epoch in range(cut.epochs):
            order[row, epoch * n : (epoch + 1) * n] = indices[row, draw.permutation(n)]
    return BatchPlan(order, cut)
