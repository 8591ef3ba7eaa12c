"""Training at the server before the first round, on examples of its own."""

from __future__ import annotations

import math

import numpy as np

from fedsim.batches import batch_plan
from fedsim.config import Training
from fedsim.errors import ConfigError
from fedsim.examples import Examples
from fedsim.local import Block, ClientTask, run_loop
from fedsim.packing import Packed
from fedsim.types import Order

SERVER = -1  # its client number


def pretrain(task: ClientTask, examples: Examples, indices: np.ndarray, training: Training, seed: int) -> None:
    """Train the skeleton's weights, private ones included, for ``pretrain-epochs`` epochs with the local optimizer.

    Plug-ins take no part: they are the clients' business.

    Raises:
        ConfigError: training diverged.
    """
    plain = ClientTask(task.model, (), task.optimizer, task.precision)
    plan = batch_plan(
        indices[None],
        [SERVER],
        batch_size=training.batch_size,
        epochs=training.pretrain_epochs,
        smallest=plain.smallest_batch,
        seed=seed,
    )
    block = Block([SERVER], [Packed.nothing()], [(np.array([0]), plan)])
    fetch = examples.fetcher(seed, 0, training.augment)
    for outcome in run_loop(plain, Order(0, plain.initial()[0]), block, training.lr, fetch):
        loss = float(outcome.loss)
        if not math.isfinite(loss):
            raise ConfigError(
                f"training.pretrain-epochs: the loss on the server's examples is {loss}; lower training.lr"
            )
