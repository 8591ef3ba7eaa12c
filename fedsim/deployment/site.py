"""The client's half: its data, its model and its private state, and the same worker as in the simulation."""

from __future__ import annotations

import math
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.build import Plan, plan
from fedsim.config import Config, parse_config
from fedsim.data import Dataset, Partition, hold_out, load_dataset, partition
from fedsim.deployment.jobs import CLIENT_THREADS, PER_ROUND, Job, end_of
from fedsim.errors import ConfigError, DataError
from fedsim.guard import refuse
from fedsim.packing import Packed
from fedsim.store import ClientStore
from fedsim.types import ClientState, Order, Reply, Tensors
from fedsim.worker import EvaluationJob, Score, Worker

TASKS = ("train", "statistics", "score")
UNFOLDED = 64  # models' worth of memory that an order may take


class Refused(Exception):
    """An order that makes no sense, or that could not be carried out; the message is for the server."""


def domains_of(config: Config) -> list[str]:
    return [d.strip() for d in config.federation.domains.split(",") if d.strip()]


def own_shard(config: Config, dataset: Dataset, domain: str, client: int) -> tuple[Partition, Partition | None]:
    """(training, validation) with this client's examples at its number, as the simulation cuts them, and no others.

    Raises:
        ConfigError: the number is not one of this domain's.
    """
    federation, domains = config.federation, domains_of(config)
    each, number = federation.clients_per_domain, domains.index(domain)
    if client // each != number or client < 0:
        raise ConfigError(f"client {client} is not of domain '{domain}'")
    of_domain = partition(
        dataset,
        [domain],
        federation.partition,
        each,
        config.seed,
        alpha=federation.alpha,
        classes_per_client=federation.classes_per_client,
        power=federation.power,
        min_examples=federation.min_examples,
        examples_per_client=federation.examples_per_client,
        first=number,
    )
    own = of_domain[client % each]
    offsets = np.where(np.arange(each * len(domains) + 1) > client, len(own), 0).astype(np.int64)
    owners = np.repeat(np.arange(len(domains)), each).astype(np.int16)
    shards = Partition(own, offsets, owners, tuple(domains))
    return hold_out(shards, dataset, federation.validation, config.seed) if federation.validation else (shards, None)


def refuse_order(job: Job, order: Order, expected: Tensors, rounds: int, tasks: tuple[str, ...] = TASKS) -> str | None:
    """Why a client should not do this, or None."""
    if order.task not in tasks:
        return f"task '{order.task}', expected {', '.join(tasks)}"
    if order.round > rounds:
        return f"round {order.round} of {rounds}"
    if job.sequence // PER_ROUND != order.round or job.oldest > order.round:
        # Either would make this client forget private state that the run still needs.
        return f"number {job.sequence}, oldest checkpoint {job.oldest}, does not belong to round {order.round}"
    bad = next((n for n, v in order.scalars.items() if not math.isfinite(v)), None)
    if bad is not None or order.scalars.get("lr", 0.0) < 0:
        return f"'{bad or 'lr'}' is {order.scalars[bad or 'lr']!r}"
    reason = refuse(order.shared, expected) or refuse(order.extra, order.extra)
    if reason is not None:
        return reason

    if not set(order.returns or ()) <= expected.keys():
        return "it asks for tensors that are not part of the model"
    if order.masks and not any(bool(v.any()) for v in order.masks.values()):
        return "the masks leave no weight"
    return None


class Site:
    """Args: data: 'digits' for the built-in suite, else the folder of this client's own data.

    state: folder of the private state; None keeps it in memory, where a restart loses it.
    """

    def __init__(self, domain: str, data: str, state: Path | None):
        self.domain, self.data, self.folder = domain, data, state
        self.opened: Job | None = None
        self.store: ClientStore | None = None
        self.plan: Plan
        self.worker: Worker

    def _config(self, job: Job) -> Config:
        try:
            values = tomllib.loads(job.config)
        except ValueError as error:
            raise ConfigError(f"the server's configuration is not TOML: {error}") from None
        config = parse_config(values, "the server's configuration")
        if self.domain not in domains_of(config):
            raise ConfigError(f"this client's domain '{self.domain}' is not of the run's: {config.federation.domains}")
        if config.simulation.threads > CLIENT_THREADS:
            raise ConfigError(
                f"simulation.threads = {config.simulation.threads}: expected {CLIENT_THREADS} at most here"
            )
        return config

    def _dataset(self, config: Config) -> Dataset:
        if self.data != "digits" and (Path(self.data) / "meta.json").exists():
            dataset = Dataset(Path(self.data))
        elif self.data == "digits":
            dataset = load_dataset("digits", progress=False)
        else:
            federation = config.federation
            dataset = load_dataset(federation.dataset, self.data, image_size=federation.image_size, progress=False)
        if self.domain not in dataset.domains:
            raise DataError(f"{self.data}: no domain '{self.domain}' there; it has {', '.join(dataset.domains)}")
        return dataset

    def hello(self, job: Job) -> dict[str, Any]:
        """What the server must know of the data to build the same model: never an example."""
        dataset = self._dataset(self._config(job))
        return {
            "domain": self.domain,
            "classes": list(dataset.classes),
            "shape": list(dataset.shape),
            "dtype": str(dataset.x_train.dtype),
            "digest": dataset.digest,
        }

    def place(self, job: Job) -> dict[str, int]:
        """Take a number; returns the sizes of what this client holds."""
        self._open(job)
        validation = self.plan.validation
        return {
            "train": len(self.plan.shards[job.client]),
            "validation": len(validation[job.client]) if validation is not None else 0,
            "test": len(self.plan.dataset.slice(self.domain, "test")),
        }

    def _open(self, job: Job) -> ClientStore:
        """Data, model and worker are built once for a run and stay in memory."""
        now = self.opened
        if now and self.store and (now.config, now.run, now.client) == (job.config, job.run, job.client):
            return self.store
        config = self._config(job)
        dataset = self._dataset(config)
        shards, validation = own_shard(config, dataset, self.domain, job.client)
        self.plan = plan(config, (dataset, shards, validation))
        self.worker = Worker(self.plan.spec)
        self.initial, private = self.plan.task.initial()
        self.untrained = Packed.of(ClientState(private))
        if self.store is not None:
            self.store.close()
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.store = ClientStore(self.folder / f"{job.run}-{self.domain}.sqlite" if self.folder else None)
        self.opened = job
        return self.store

    def refuse_size(self, job: Job, size: int) -> None:
        """
        Raises:
            Refused: an order of ``size`` bytes in memory is out of all proportion to the model.
        """
        self._open(job)
        most = UNFOLDED * (sum(v.nbytes for v in self.initial.values()) + 1024)
        if size > most:
            raise Refused(f"order refused: its tensors take {size} bytes, {most} at most are expected")

    def train(self, job: Job, order: Order) -> tuple[Reply, int]:
        """(reply, examples left out by the last-batch policy).

        Raises:
            Refused: the order makes no sense, or the work failed.
        """
        store = self._open(job)
        reason = refuse_order(job, order, self.initial, self.plan.config.rounds)
        if reason is not None:
            raise Refused(f"order refused: {reason}")
        # Always from the state before this order, so that one sent again gives the same bits.
        store.rewind(job.sequence - 1)
        state = store.get(job.client) or self.untrained
        result = self.worker.train(replace(order, fold=False), [job.client], [state], job.threads)
        if result.failures:
            raise Refused(result.failures[0].reason)
        for client, after in result.states.items():
            store.put(client, job.sequence, after)
        store.flush()
        store.prune(end_of(job.oldest))
        return result.replies[0][0], result.dropped

    def evaluate(self, job: Job, order: Order) -> Score:
        """This client's own model on its test split, or on its held-out examples; under an evaluation mode if asked.

        Raises:
            Refused: the order makes no sense, its tensors are not the model's, or the run's configuration does not list
                the mode.
        """
        store, shared = self._open(job), order.shared
        reason = refuse_order(job, order, self.initial, self.plan.config.rounds, ("evaluate",))
        if reason is None and job.mode and (job.mode not in self.plan.modes or job.split != "test"):
            reason = f"no mode '{job.mode}' for '{job.split}' in the run's configuration"
        if reason is not None:
            raise Refused(f"evaluation refused: {reason}")
        store.rewind(job.sequence)
        private = (store.get(job.client) or self.untrained).without_memory()
        indices = self.plan.dataset.slice(self.domain, "test")
        if job.split == "validation":
            indices = self.plan.validation[job.client] if self.plan.validation is not None else indices[:0]
        work = EvaluationJob(job.client, self.domain, job.split, indices, private, job.mode)
        (score,) = self.worker.evaluate(shared, [work])
        return score

    def close(self) -> None:
        if self.store is not None:
            self.store.close()
