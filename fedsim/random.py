"""Every random number of a run comes from here: a generator is a pure function of (seed, round, client, purpose)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

PURPOSES = (
    "model",  # initial weights
    "partition",  # which examples a client holds
    "validation",  # which of them are held out
    "sample",  # which clients a round trains
    "batches",  # order of a client's examples
    "augment",
    "dropout",  # what a model draws: torch's own generator is seeded before clients are trained
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


def generators(seed: int, clients: Sequence[int], *, round: int = 0, purpose: str) -> Iterator[np.random.Generator]:
    """``generator`` of every client in turn, three times faster: the seeds of all clients are hashed together.

    The object is the same each time: use it before asking for the next.
    """
    bits = np.random.PCG64(0)
    draw = np.random.Generator(bits)
    words = _seed_words(seed, round, np.asarray(clients, np.int64), purpose).tolist()
    for high, low, sequence_high, sequence_low in words:
        increment = (((sequence_high << 64 | sequence_low) << 1) | 1) & MASK
        state = ((increment + (high << 64 | low)) * PCG_MULTIPLIER + increment) & MASK
        bits.state = {
            "bit_generator": "PCG64",
            "state": {"state": state, "inc": increment},
            "has_uint32": 0,
            "uinteger": 0,
        }
        yield draw


PCG_MULTIPLIER = 2549297995355413924 << 64 | 4865540595714422341  # O'Neill 2014, as in numpy
MASK = 2**128 - 1


def _seed_words(seed: int, round: int, clients: np.ndarray, purpose: str) -> np.ndarray:
    """``_sequence(...).generate_state(4, uint64)`` of every client, [k, 4]: numpy's SeedSequence over columns.

    Its hash (O'Neill's seed_seq_fe) is a documented part of numpy's interface that does not change.
    """
    column = lambda value: np.full(len(clients), value, np.uint32)  # noqa: E731
    entropy = [column(seed >> 32 * i & 0xFFFFFFFF) for i in range(4)]
    entropy += [column(PURPOSES.index(purpose)), column(round + 2**20), (clients + 1).astype(np.uint32)]
    constant = 0x43B0D7E5

    def hashed(value: np.ndarray) -> np.ndarray:
        nonlocal constant
        value = value ^ np.uint32(constant)
        constant = constant * 0x931E8875 & 0xFFFFFFFF
        value = value * np.uint32(constant)
        return value ^ value >> np.uint32(16)

    def mixed(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        result: np.ndarray = np.uint32(0xCA01F9DD) * x - np.uint32(0x4973F715) * y
        return result ^ result >> np.uint32(16)

    pool = [hashed(word) for word in entropy[:4]]
    for source in range(4):
        for target in range(4):
            if source != target:
                pool[target] = mixed(pool[target], hashed(pool[source]))
    for word in entropy[4:]:
        pool = [mixed(p, hashed(word)) for p in pool]
    out, constant = [], 0x8B51F9DD
    for i in range(8):
        value = pool[i % 4] ^ np.uint32(constant)
        constant = constant * 0x58F38DED & 0xFFFFFFFF
        value = value * np.uint32(constant)
        out.append((value ^ value >> np.uint32(16)).astype(np.uint64))
    return np.stack([low | high << np.uint64(32) for low, high in zip(out[::2], out[1::2])], 1)


def torch_generator(
    seed: int, *, round: int = 0, client: int = -1, purpose: str, device: torch.device | str = "cpu"
) -> torch.Generator:
    """The same for torch."""
    state = _sequence(seed, round, client, purpose).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))
