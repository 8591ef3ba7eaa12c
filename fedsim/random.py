"""Every random number of a run comes from here: a generator is a pure function of (seed, round, client, purpose)."""

from __future__ import annotations

import numpy as np
import torch

PURPOSES = (
    "model",  # initial weights
    "partition",  # which examples a client holds
    "validation",  # which of them are held out
    "sample",  # which clients a round trains
    "batches",  # order of a client's examples
    "augment",
    "dropout",
    "server",  # the server half of a strategy
    "client",  # the client half of a strategy
    "evaluate",
)


def _sequence(seed: int, round: int, client: int, purpose: str) -> np.random.SeedSequence:
    # Set-up rounds have numbers <= 0 and the server is client -1, while a spawn key holds no negative numbers.
    return np.random.SeedSequence(seed, spawn_key=(PURPOSES.index(purpose), round + 2**20, client + 1))


def generator(seed: int, *, round: int = 0, client: int = -1, purpose: str) -> np.random.Generator:
    """A numpy generator, independent of every other (seed, round, client, purpose)."""
    return np.random.Generator(np.random.PCG64(_sequence(seed, round, client, purpose)))


def torch_generator(
    seed: int, *, round: int = 0, client: int = -1, purpose: str, device: torch.device | str = "cpu"
) -> torch.Generator:
    """The same for torch."""
    state = _sequence(seed, round, client, purpose).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))
