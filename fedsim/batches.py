"""Which examples a client sees at each local step: a pure function of (seed, round, client)."""

from __future__ import annotations

import numpy as np

from fedsim.random import generator


def batch_plan(
    indices: np.ndarray,
    *,
    batch_size: int,
    epochs: int = 1,
    steps: int = 0,
    last: str = "keep",
    smallest: int = 1,
    seed: int = 0,
    round: int = 0,
    client: int = 0,
) -> tuple[list[np.ndarray], int]:
    """Shuffle a shard anew for every epoch and cut it into batches.

    Args:
        indices: the client's examples, int64 [n].
        steps: so many steps (over as many epochs as that takes) instead of ``epochs``.
        last: ``keep`` the smaller batch at the end of an epoch or ``drop`` it. A shard smaller than one batch is
            always kept: a client that holds data trains.
        smallest: batches below this size are dropped whatever ``last`` says: BatchNorm in training mode
            refuses a batch of one.

    Returns:
        (index arrays of the steps, number of examples left out by ``last`` and ``smallest``).
    """
    order = generator(seed, round=round, client=client, purpose="batches")
    plan: list[np.ndarray] = []
    dropped, epoch = 0, 0
    while epoch < epochs if not steps else len(plan) < steps:
        shuffled = indices[order.permutation(len(indices))]
        for start in range(0, len(shuffled), batch_size):
            batch = shuffled[start : start + batch_size]
            short = len(batch) < batch_size and last == "drop" and start > 0
            if short or len(batch) < smallest:
                dropped += len(batch)
            else:
                plan.append(batch)
        epoch += 1
        if not plan:
            break  # nothing trainable in this shard: the caller reports it
    return plan[:steps] if steps else plan, dropped
