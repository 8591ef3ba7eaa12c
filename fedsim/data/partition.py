"""Which client holds which training examples: flat index arrays, exact, and a function of the seed.

A scheme is a function (labels [N] of shuffled examples, clients, draw) -> owner int64 [N]: each example has exactly one
client. Clients that would hold fewer than ``min_examples`` are topped up, one example at a time, from the client that
then holds the most (which may add classes to a client of ``shards``). Every share is in random order.
"""

from __future__ import annotations

import difflib
import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

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

    def by_size(self, clients: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Shards of equal size together: (positions in ``clients`` [k], the shards int64 [k, n])."""
        chosen = np.asarray(clients, np.int64)
        starts = self.offsets[chosen]
        sizes = self.offsets[chosen + 1] - starts
        found = []
        for size in np.unique(sizes):
            positions = np.flatnonzero(sizes == size)
            found.append((positions, self.indices[starts[positions, None] + np.arange(size)]))
        return found


Scheme = Callable[[np.ndarray, int, np.random.Generator], np.ndarray]


def _shares(total: int, weights: np.ndarray) -> np.ndarray:
    """Whole numbers in the proportion of ``weights`` that sum to ``total`` (largest remainders)."""
    exact = total * weights / weights.sum()
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1
    return counts


def iid(labels: np.ndarray, clients: int, draw: np.random.Generator) -> np.ndarray:
    """Equal shares of the shuffled examples."""
    return np.repeat(np.arange(clients), _shares(len(labels), np.ones(clients)))


def dirichlet(labels: np.ndarray, clients: int, draw: np.random.Generator, *, alpha: float) -> np.ndarray:
    """Each class is spread over the clients in proportions drawn from Dirichlet(alpha) (Hsu et al. 2019)."""
    owner = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        owner[rows] = np.repeat(np.arange(clients), _shares(len(rows), draw.dirichlet(np.full(clients, alpha))))
    return owner


def shards(labels: np.ndarray, clients: int, draw: np.random.Generator, *, classes: int) -> np.ndarray:
    """Shards of one class each, dealt ``classes`` to a client: no client holds more than so many classes.

    McMahan et al. (2017) cut the list sorted by label instead, where a shard across the border of two classes gives
    some clients more classes than asked for.
    """
    present, sizes = np.unique(labels, return_counts=True)
    if clients * classes < len(present):
        raise ConfigError(
            f"federation.partition = 'shards': {clients} clients of {classes} classes cannot hold {len(present)};"
            f" expected at least {-(-len(present) // classes)} clients, or a larger classes-per-client"
        )
    per_class = 1 + _shares(clients * classes - len(present), sizes)
    deal = np.split(draw.permutation(np.repeat(np.arange(clients), classes)), np.cumsum(per_class)[:-1])
    owner = np.empty(len(labels), np.int64)
    for label, holders in zip(present, deal):
        rows = np.flatnonzero(labels == label)
        owner[rows] = holders[np.arange(len(rows)) % len(holders)]
    return owner


def quantity(labels: np.ndarray, clients: int, draw: np.random.Generator, *, power: float) -> np.ndarray:
    """Sizes follow a power law: the client of rank r gets a share proportional to r^-power; labels are iid."""
    weights = draw.permutation(np.arange(1, clients + 1, dtype=np.float64) ** -power)
    return np.repeat(np.arange(clients), _shares(len(labels), weights))


def _top_up(owner: np.ndarray, clients: int, least: int) -> np.ndarray:
    sizes = np.bincount(owner, minlength=clients)
    poor = np.flatnonzero(sizes < least)
    if not len(poor):
        return owner
    owner, by_client, end = owner.copy(), np.argsort(owner, kind="stable"), np.cumsum(sizes)
    richest = [(-int(size), client) for client, size in enumerate(sizes)]
    heapq.heapify(richest)
    for client in poor:
        for _ in range(least - sizes[client]):
            size, giver = heapq.heappop(richest)
            end[giver] -= 1
            owner[by_client[end[giver]]] = client
            heapq.heappush(richest, (size + 1, giver))
    return owner


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
    examples_per_client: int | None = None,
    first: int = 0,
) -> Partition:
    """Cut the training examples of ``domains`` into shards.

    Args:
        scheme: iid, dirichlet, shards, quantity, pooled (one client holds everything: the centralised baseline), or
            natural (a client for every speaker or writer of a data set that knows them; ``clients_per_domain`` is
            theirs, and who holds fewer than ``min_examples`` is left out).
        across: partition the union of the domains into ``clients_per_domain * len(domains)`` mixed clients.
        examples_per_client: keep only the first so many of each share; None or 0 keeps all.
        first: number of the first of ``domains`` in the federation: a client that has its own domain alone draws as
            the simulation does.

    Raises:
        ConfigError: an unknown domain or scheme, a figure out of range, or too few examples for so many clients.
    """
    schemes: dict[str, Scheme] = {
        "iid": iid,
        "dirichlet": partial(dirichlet, alpha=alpha),
        "shards": partial(shards, classes=classes_per_client),
        "quantity": partial(quantity, power=power),
        "pooled": iid,
        "natural": iid,  # not a draw: see _natural
    }
    cap = examples_per_client or 0
    _check(dataset, domains, scheme, tuple(schemes))
    _check_figures(clients_per_domain, alpha, classes_per_client, power, min_examples, cap)
    groups = [dataset.slice(d, "train") for d in domains]
    if scheme == "natural":
        return _natural(dataset, domains, groups, min_examples, cap)
    pooled, mixed = scheme == "pooled", (scheme == "pooled" or across) and len(domains) > 1
    clients = 1 if pooled else clients_per_domain * (len(domains) if mixed else 1)
    if mixed:
        groups = [np.concatenate(groups)]
    indices, sizes = [], []
    for number, group in enumerate(groups):
        where = "all domains together" if mixed else f"'{domains[number]}'"
        if len(group) < clients * min_examples:
            raise ConfigError(
                f"federation: {clients} clients of at least {min_examples} examples need {clients * min_examples},"
                f" {where} of {dataset.name} has {len(group)} (fewer clients-per-domain or min-examples)"
            )
        draw = generator(seed, client=first + number, purpose="partition")
        group = group[draw.permutation(len(group))]
        owner = _top_up(schemes[scheme](_labels(dataset, group), clients, draw), clients, min_examples)
        indices.append(group[np.argsort(owner, kind="stable")])
        sizes.append(np.bincount(owner, minlength=clients))
    owners = np.full(clients, -1) if mixed else np.repeat(np.arange(len(groups)), clients)
    whole = _flat(np.concatenate(indices), np.concatenate(sizes), owners, tuple(domains))
    return _first(whole, cap) if cap else whole


def _natural(dataset: Dataset, domains: Sequence[str], groups: Sequence[np.ndarray], least: int, cap: int) -> Partition:
    missing = [d for d in domains if d not in dataset.groups]
    if missing:
        raise ConfigError(
            f"federation.partition = 'natural': {dataset.name} does not know whose the examples of '{missing[0]}' are"
            " (use iid, dirichlet, shards or quantity)"
        )
    indices, sizes, owners = [], [], []
    for number, (domain, group) in enumerate(zip(domains, groups)):
        counts = np.array(dataset.groups[domain])
        kept = counts >= least
        indices.append(group[np.repeat(kept, counts)])
        sizes.append(counts[kept])
        owners.append(np.full(int(kept.sum()), number))
    whole = _flat(np.concatenate(indices), np.concatenate(sizes), np.concatenate(owners), tuple(domains))
    if not len(whole):
        raise ConfigError(f"federation.min-examples = {least}: no client of {dataset.name} holds so many")
    return _first(whole, cap) if cap else whole


def _check(dataset: Dataset, domains: Sequence[str], scheme: str, schemes: tuple[str, ...]) -> None:
    unknown = [d for d in domains if d not in dataset.domains]
    if unknown:
        raise ConfigError(
            f"federation.domains: '{unknown[0]}' is no domain of {dataset.name}; it has {', '.join(dataset.domains)}"
        )
    if not domains or len(set(domains)) < len(domains):
        raise ConfigError(f"federation.domains = '{','.join(domains)}': expected at least one, each once")
    if scheme not in schemes:
        near = difflib.get_close_matches(scheme, schemes, 1)
        hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(schemes)}"
        raise ConfigError(f"federation.partition = '{scheme}': no such scheme; {hint}")


def _check_figures(clients: int, alpha: float, classes: int, power: float, least: int, cap: int) -> None:
    figures: dict[str, tuple[float, bool, str]] = {
        "clients-per-domain": (clients, clients >= 1, "at least 1"),
        "alpha": (alpha, 0 < alpha < np.inf, "above 0"),
        "classes-per-client": (classes, classes >= 1, "at least 1"),
        "power": (power, 0 <= power < np.inf, "0 or above"),
        "min-examples": (least, least >= 0, "0 or above"),
        "examples-per-client": (cap, cap == 0 or cap >= max(least, 1), "0 (all), or min-examples or more"),
    }
    for key, (value, good, expected) in figures.items():
        if not good:
            raise ConfigError(f"federation.{key} = {value}: expected {expected}")


def _labels(dataset: Dataset, rows: np.ndarray) -> np.ndarray:
    """int64 [N]: the label, or the first of a sequence of labels."""
    labels = np.asarray(dataset.y_train[rows])
    return labels if labels.ndim == 1 else labels[:, 0]


def _flat(indices: np.ndarray, sizes: np.ndarray, domain: np.ndarray, domains: tuple[str, ...]) -> Partition:
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return Partition(indices.astype(np.int64), offsets, domain.astype(np.int16), domains)


def _first(shards: Partition, count: int) -> Partition:
    """The first ``count`` examples of every client."""
    place = np.arange(len(shards.indices)) - np.repeat(shards.offsets[:-1], shards.sizes)
    return _flat(shards.indices[place < count], np.minimum(shards.sizes, count), shards.domain, shards.domains)


def hold_out(shards: Partition, dataset: Dataset, fraction: float, seed: int) -> tuple[Partition, Partition]:
    """(training, validation): ``fraction`` of every share set aside, stratified by label.

    A client keeps at least one example for training, so one with a single example has nothing to validate on.

    Raises:
        ConfigError: a fraction outside 0 <= fraction < 1.
    """
    if not 0 <= fraction < 1:
        raise ConfigError(f"federation.validation = {fraction}: expected 0 or above and below 1")
    labels, held = _labels(dataset, shards.indices), np.zeros(len(shards.indices), bool)
    for client, size in enumerate(shards.sizes):
        count = min(round(fraction * size), size - 1)
        if count <= 0:
            continue
        start = shards.offsets[client]
        order = generator(seed, client=client, purpose="validation").permutation(size)
        # Shuffled, then sorted by label: every 1 / fraction-th is a stratified sample.
        order = order[np.argsort(labels[start + order], kind="stable")]
        held[start + order[((np.arange(count) + 0.5) * size / count).astype(np.int64)]] = True
    counts = np.add.reduceat(np.append(held, False), shards.offsets[:-1]) * (shards.sizes > 0)
    return (
        _flat(shards.indices[~held], shards.sizes - counts, shards.domain, shards.domains),
        _flat(shards.indices[held], counts, shards.domain, shards.domains),
    )


def set_apart(shards: Partition, dataset: Dataset, per_class: int, seed: int) -> tuple[Partition, np.ndarray]:
    """(what the clients keep, examples of the server's own): ``per_class`` of every class, drawn over all clients.

    Raises:
        ConfigError: a class or a client has too few examples for that.
    """
    labels, taken = _labels(dataset, shards.indices), np.zeros(len(shards.indices), bool)
    order = generator(seed, purpose="server").permutation(len(labels))
    for number, name in enumerate(dataset.classes):
        found = order[labels[order] == number]
        if len(found) <= per_class:
            raise ConfigError(
                f"federation.public-per-class = {per_class}: class '{name}' has {len(found)} training examples in all"
            )
        taken[found[:per_class]] = True
    counts = np.add.reduceat(np.append(taken, False), shards.offsets[:-1]) * (shards.sizes > 0)
    if (counts >= shards.sizes).any():
        client = int(np.argmax(counts >= shards.sizes))
        raise ConfigError(f"federation.public-per-class = {per_class}: client {client} would keep no example")
    kept = _flat(shards.indices[~taken], shards.sizes - counts, shards.domain, shards.domains)
    return kept, np.sort(shards.indices[taken])
