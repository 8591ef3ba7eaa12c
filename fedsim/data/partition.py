"""Which client holds which training examples: flat index arrays, exact, and a function of the seed.

Every scheme gives each example of the chosen domains to exactly one client. Clients that would hold fewer than
``min_examples`` are topped up, one example at a time, from the client that then holds the most.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fedsim.data.dataset import Dataset
from fedsim.errors import ConfigError
from fedsim.random import generator


@dataclass(frozen=True)
class Partition:
    """Clients' shards in one flat array: ``indices[offsets[c] : offsets[c + 1]]`` are client c's examples.

    Attributes:
        indices: int64 [N], positions in the training arrays.
        offsets: int64 [clients + 1].
        domain: int16 [clients], position in ``domains``, or -1 for a client that mixes domains.
        domains: names of the federation's domains.
    """

    indices: np.ndarray
    offsets: np.ndarray
    domain: np.ndarray
    domains: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, client: int) -> np.ndarray:
        return self.indices[self.offsets[client] : self.offsets[client + 1]]

    @property
    def sizes(self) -> np.ndarray:
        return np.diff(self.offsets)


def _cut(indices: np.ndarray, counts: np.ndarray) -> list[np.ndarray]:
    return np.split(indices, np.cumsum(counts)[:-1])


def _shares(total: int, weights: np.ndarray) -> np.ndarray:
    """Whole numbers in the proportion of ``weights`` that sum to ``total`` (largest remainders)."""
    exact = total * weights / weights.sum()
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1
    return counts


def iid(indices: np.ndarray, labels: np.ndarray, clients: int, draw: np.random.Generator) -> list[np.ndarray]:
    """Shuffled and cut into equal shares."""
    return np.array_split(draw.permutation(indices), clients)


def dirichlet(
    indices: np.ndarray, labels: np.ndarray, clients: int, draw: np.random.Generator, alpha: float
) -> list[np.ndarray]:
    """Each class is spread over the clients in proportions drawn from Dirichlet(alpha) (Hsu et al. 2019)."""
    owner = np.empty(len(indices), np.int64)
    for label in np.unique(labels):
        rows = draw.permutation(np.flatnonzero(labels == label))
        owner[rows] = np.repeat(np.arange(clients), _shares(len(rows), draw.dirichlet(np.full(clients, alpha))))
    return _by_owner(indices, owner, clients)


def shards(
    indices: np.ndarray, labels: np.ndarray, clients: int, draw: np.random.Generator, classes: int
) -> list[np.ndarray]:
    """Sorted by label and cut into ``clients * classes`` shards; each client is dealt ``classes`` (McMahan et al.)."""
    shuffled = draw.permutation(len(indices))
    ordered = indices[shuffled[np.argsort(labels[shuffled], kind="stable")]]
    pieces = np.array_split(ordered, clients * classes)
    deal = draw.permutation(clients * classes).reshape(clients, classes)
    return [np.concatenate([pieces[p] for p in mine]) for mine in deal]


def quantity(
    indices: np.ndarray, labels: np.ndarray, clients: int, draw: np.random.Generator, power: float
) -> list[np.ndarray]:
    """Shard sizes follow a power law: the client of rank r gets a share proportional to r^-power; labels are iid."""
    weights = draw.permutation(np.arange(1, clients + 1, dtype=np.float64) ** -power)
    return _cut(draw.permutation(indices), _shares(len(indices), weights))


def _by_owner(indices: np.ndarray, owner: np.ndarray, clients: int) -> list[np.ndarray]:
    return _cut(indices[np.argsort(owner, kind="stable")], np.bincount(owner, minlength=clients))


def _top_up(parts: list[np.ndarray], least: int) -> list[np.ndarray]:
    small = [c for c, part in enumerate(parts) if len(part) < least]
    if not small:
        return parts
    parts = list(parts)
    richest = [(-len(part), c) for c, part in enumerate(parts)]
    heapq.heapify(richest)
    taken: dict[int, int] = {}
    for client in small:
        gained: list[int] = []
        while len(parts[client]) + len(gained) < least:
            size, giver = heapq.heappop(richest)
            position = len(parts[giver]) - 1 - taken.get(giver, 0)
            gained.append(parts[giver][position])
            taken[giver] = taken.get(giver, 0) + 1
            heapq.heappush(richest, (size + 1, giver))
        parts[client] = np.concatenate([parts[client], gained]).astype(np.int64)
    return [part[: len(part) - taken.get(c, 0)] for c, part in enumerate(parts)]


def partition(
    dataset: Dataset,
    domains: Sequence[str],
    scheme: str = "iid",
    clients_per_domain: int = 1,
    seed: int = 0,
    *,
    across: bool = False,
    alpha: float = 0.5,
    classes_per_client: int = 2,
    power: float = 1.5,
    min_examples: int = 1,
    examples_per_client: int = 0,
) -> Partition:
    """Cut the training examples of ``domains`` into shards.

    Args:
        scheme: iid, dirichlet, shards, quantity, or pooled (one client holds everything: the centralised baseline).
        across: partition the union of the domains into ``clients_per_domain * len(domains)`` mixed clients.
        examples_per_client: keep only the first so many of each shard; 0 keeps all.

    Raises:
        ConfigError: an unknown domain, or too few examples for so many clients.
    """
    unknown = [d for d in domains if d not in dataset.domains]
    if unknown:
        raise ConfigError(
            f"federation.domains: '{unknown[0]}' is no domain of {dataset.name}; it has {', '.join(dataset.domains)}"
        )
    if not domains or len(set(domains)) < len(domains):
        raise ConfigError(f"federation.domains = '{','.join(domains)}': expected at least one, each once")
    schemes: dict[str, Callable[..., list[np.ndarray]]] = {
        "iid": iid,
        "dirichlet": lambda i, y, k, d: dirichlet(i, y, k, d, alpha),
        "shards": lambda i, y, k, d: shards(i, y, k, d, classes_per_client),
        "quantity": lambda i, y, k, d: quantity(i, y, k, d, power),
    }
    groups = [dataset.slice(d, "train") for d in domains]
    if scheme == "pooled" or across:
        groups = [np.concatenate(groups)]
    per_group = 1 if scheme == "pooled" else clients_per_domain * (len(domains) if across else 1)
    parts: list[np.ndarray] = []
    for number, indices in enumerate(groups):
        if len(indices) < per_group * min_examples:
            where = domains[number] if len(groups) > 1 else dataset.name
            raise ConfigError(
                f"federation: {per_group} clients of at least {min_examples} examples need"
                f" {per_group * min_examples}, '{where}' has {len(indices)}"
            )
        draw = generator(seed, client=number, purpose="partition")
        labels = np.asarray(dataset.y_train[indices]).reshape(len(indices), -1)[:, 0]
        rule = schemes["iid" if scheme == "pooled" else scheme]
        parts += _top_up(rule(indices, labels, per_group, draw), min_examples)
    if examples_per_client:
        parts = [part[:examples_per_client] for part in parts]
    mixed = (scheme == "pooled" or across) and len(domains) > 1
    owner = np.full(len(parts), -1) if mixed else np.repeat(np.arange(len(groups)), per_group)
    offsets = np.concatenate([[0], np.cumsum([len(p) for p in parts])]).astype(np.int64)
    return Partition(np.concatenate(parts).astype(np.int64), offsets, owner.astype(np.int16), tuple(domains))


def hold_out(shards: Partition, dataset: Dataset, fraction: float, seed: int) -> tuple[Partition, Partition]:
    """(training, validation): ``fraction`` of every shard set aside, stratified by label.

    A shard of one example keeps it for training.
    """
    kept, held = [], []
    for client in range(len(shards)):
        shard = shards[client]
        draw = generator(seed, client=client, purpose="validation")
        labels = np.asarray(dataset.y_train[shard]).reshape(len(shard), -1)[:, 0]
        # Shuffled, then sorted by label: every 1 / fraction-th is a stratified sample.
        order = draw.permutation(len(shard))
        order = order[np.argsort(labels[order], kind="stable")]
        count = min(round(fraction * len(shard)), len(shard) - 1)
        chosen = np.zeros(len(shard), bool)
        if count > 0:
            chosen[order[((np.arange(count) + 0.5) * len(shard) / count).astype(np.int64)]] = True
        kept.append(shard[~chosen])
        held.append(shard[chosen])
    return _pack(kept, shards), _pack(held, shards)


def _pack(parts: list[np.ndarray], like: Partition) -> Partition:
    offsets = np.concatenate([[0], np.cumsum([len(p) for p in parts])]).astype(np.int64)
    return Partition(np.concatenate(parts).astype(np.int64), offsets, like.domain, like.domains)
