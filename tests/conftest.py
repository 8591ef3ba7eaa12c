"""A small federation of three domains that any test can run in a second."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

from pathlib import Path

import numpy as np
import pytest
import torch

from fedsim.build import task_of
from fedsim.config import Config, parse_config
from fedsim.data import Dataset, Partition
from fedsim.engine import Federation, block_size
from fedsim.evaluation import modes_of
from fedsim.examples import Examples
from fedsim.models import model_names
from fedsim.pool import InProcess
from fedsim.registry import resolve, server_of
from fedsim.store import ClientStore
from fedsim.worker import WorkerSpec

torch.set_num_threads(1)

# Every model of images but the large ViTs, which are vit-tiny in other widths; the others: tests/models/test_lstm.py
IMAGE_MODELS = [n for n in model_names() if "lstm" not in n and n not in ("vit-small", "vit-base")]
DOMAINS = ("photo", "sketch", "scan")


def small_dataset(
    folder: Path, *, per_domain: int = 40, shape: tuple[int, ...] = (3, 12, 12), classes: int = 4
) -> Dataset:
    """Images of vertical bars whose position is the class; each domain has its own contrast and brightness."""
    draw = np.random.default_rng(0)
    arrays = {}
    for number, domain in enumerate(DOMAINS):
        splits = {}
        for split, count in (("train", per_domain), ("test", 20)):
            y = np.arange(count) % classes
            x = draw.normal(60 + 50 * number, 20, (count, *shape))
            width = shape[-1] // classes
            for i, label in enumerate(y):
                x[i, ..., label * width : (label + 1) * width] += 60 - 15 * number
            splits[split] = (x.clip(0, 255).astype(np.uint8), y.astype(np.int64))
        arrays[domain] = splits
    return Dataset.from_arrays("bars", folder, arrays, classes=tuple("abcd"[:classes]))


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return small_dataset(tmp_path_factory.mktemp("bars"))


def shards_of(dataset: Dataset, sizes: tuple[int, ...] = (40, 33, 37)) -> Partition:
    """One client a domain, of unequal sizes, so that every block is ragged."""
    starts = [dataset.slice(d, "train")[:s] for d, s in zip(dataset.domains, sizes)]
    offsets = np.concatenate([[0], np.cumsum([len(s) for s in starts])]).astype(np.int64)
    domain = np.arange(len(sizes), dtype=np.int16)
    return Partition(np.concatenate(starts), offsets, domain, dataset.domains[: len(sizes)])


def nine_clients(dataset: Dataset) -> Partition:
    """Three a domain, of twelve examples; the last has eight."""
    domains = dataset.domains[:3]
    rows = np.concatenate([dataset.slice(d, "train")[:36] for d in domains])[:-4]
    offsets = np.append(np.arange(0, 108, 12), 104)
    return Partition(rows, offsets, np.arange(9, dtype=np.int16) // 3, domains)


def small_config(**sections) -> Config:
    base = {
        "rounds": 3,
        "model": {"name": "small-cnn"},
        "training": {"batch-size": 8, "lr": 0.05},
        "simulation": {"workers": 0},
    }
    for key, value in sections.items():
        key = key.replace("_", "-")
        base[key] = {**base.get(key, {}), **value} if isinstance(value, dict) else value
    return parse_config(base)


class Small:
    """A configuration made concrete on the small data set, without a run directory."""

    def __init__(self, dataset: Dataset, shards: Partition | None = None, pool=None, **sections):
        self.config, self.parts = resolve(small_config(**sections))
        self.dataset, self.shards = dataset, shards or shards_of(dataset)
        self.task = task_of(self.config, self.parts, len(dataset.classes), dataset.shape)
        self.strategy = server_of(self.parts, self.task, self.config)
        examples = Examples(dataset, dtype=getattr(torch, self.config.training.dtype))
        self.strategy.public = examples.batch("train", np.arange(8))
        executor = self.config.simulation.executor
        executor = "loop" if executor == "auto" else executor
        training = self.config.training
        self.spec = WorkerSpec(
            self.task,
            self.dataset,
            self.shards,
            training,
            self.config.seed,
            self.config.rounds,
            executor,
            evaluation_batch=self.config.evaluation.batch_size,
            modes=modes_of(self.config, self.task),
            debug=True,
            threads=self.config.simulation.threads,
        )
        size = self.config.simulation.block or block_size(executor, len(self.shards), 1 << 20)
        self.federation = Federation(
            self.spec,
            (pool or InProcess)(self.spec),
            ClientStore(),
            cohort=len(self.shards),
            block=size,
            odd_block_threads=self.config.simulation.odd_block_threads or 1,
        )

    def run(self, rounds: int = 3):
        """The final server state after ``rounds``."""
        first = 1 - self.strategy.setup_rounds
        state = self.strategy.init(self.federation.shared)
        for round in range(first, rounds + 1):
            for order in self.strategy.orders(round, state):
                replies = self.federation.train(order, self.federation.sample(round))
                state = self.strategy.aggregate(round, state, order, replies)
        return state


def nine(dataset: Dataset, model: str = "small-cnn", block: int = 1, **options) -> Small:
    """In float64, whose sums are rounded: of a few numbers in float32 they are exact, in any order."""
    sections = {"model": {"name": model}, "training": {"dtype": "float64"}, "simulation": {"block": block}}
    return Small(dataset, nine_clients(dataset), **sections, **options)
