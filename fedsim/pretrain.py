"""Training at the server before the first round, on examples of its own."""

from __future__ import annotations

import math

import numpy as np

from fedsim.batches import batch_plan
from fedsim.config import Training
from fedsim.errors import ConfigError
from fedsim.examples import Examples
from fedsim.local import ClientTask, Work, run_loop
from fedsim.types import ClientState, Order

SERVER = -1  # its client number


def pretrain(task: ClientTask, examples: Examples, indices: np.ndarray, training: Training, seed: int) -> None:
    """Train the skeleton's weights, private ones included, for ``pretrain-epochs`` epochs with the local optimizer.

    Plug-ins take no part: they are the clients' business.

    Raises:
        ConfigError: training diverged.
    """
    plain = ClientTask(task.model, (), task.optimizer)
    plan, _ = batch_plan(
        indices,
        batch_size=training.batch_size,
        epochs=training.pretrain_epochs,
        smallest=plain.smallest_batch,
        seed=seed,
        client=SERVER,
    )
    work = Work(SERVER, ClientState(), plan, examples.fetcher(seed, 0, SERVER, training.augment))
    for outcome in run_loop(plain, Order(0, plain.initial()[0]), [work], training.lr):
        if not math.isfinite(outcome.loss):
            raise ConfigError(
                f"training.pretrain-epochs: the loss on the server's examples is {outcome.loss}; lower training.lr"
            )
