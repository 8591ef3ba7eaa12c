"""Neutral federations that every contender trains: data, initial weights, cohorts and batches from fixed numpy seeds.

A client's batches are its examples in stored order, cut every ``batch`` examples; every client of a workload holds the
same number. So whoever does the same work ends at the same training loss, and ``run.py`` checks that they do.

cifar    cross-device: 1000 clients x 50 images 3x32x32, the FedAvg paper's CNN (2,156,490 parameters), 50 a round
digits   cross-silo: 5 clients x 743 images 3x28x28, FedBN's CNN (14,219,210 parameters), all five a round
domains  50 clients in five domains of fedsim's digits suite x 64 images, the same CNN, normalization layers private
         (FedBN): whole batches of 32, so that a step does the work of a step of ``digits``
tiny     all overhead: 10,000 clients x 20 samples of 60 features, logistic regression (610 parameters), 1000 a round
tiny-K   the same with K clients a round out of max(10,000, K), for the curve of cost against clients

numpy and the standard library only: every contender's environment can import this.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

CLASSES = 10
CHUNK = 100  # clients generated at a time, each chunk from a seed of its own: K clients are the first K of any number


@dataclass(frozen=True)
class Workload:
    """One federation and what a client does in a round: one epoch of plain SGD.

    Attributes:
        clients: registered clients; ``cohort`` of them train in a round.
        examples: of every client; ``shape`` of one example; ``batch`` of them a step.
        domains: clients are dealt to them in equal runs.
        data: where examples come from: linear | prototypes (drawn here) | suite (fedsim's digits, ``export_suite.py``).
        private: normalization layers stay on the client (FedBN).
        proof_rounds: after more rounds than this, fp32 programs that do the same work in another order may part.
        tolerance: relative difference of the training losses of two programs that did the same work.
    """

    name: str
    model: str  # logistic | mcmahan-cnn | digits-cnn
    clients: int
    cohort: int
    examples: int
    shape: tuple[int, ...]
    batch: int
    lr: float
    data: str = "prototypes"
    domains: int = 1
    private: bool = False
    proof_rounds: int = 4
    tolerance: float = 5e-3

    @property
    def samples(self) -> int:
        """Examples seen in a round."""
        return self.cohort * self.examples

    def domain(self, client: int) -> int:
        return client * self.domains // self.clients


CIFAR = Workload("cifar", "mcmahan-cnn", 1000, 50, 50, (3, 32, 32), batch=10, lr=0.1)
DIGITS = Workload("digits", "digits-cnn", 5, 5, 743, (3, 28, 28), batch=32, lr=0.01)
DOMAINS = Workload(
    "domains", "digits-cnn", 50, 50, 64, (3, 28, 28), batch=32, lr=0.01, data="suite", domains=5, private=True
)
# A convex problem: rounding does not grow, so any number of rounds proves equal work, and tightly.
TINY = Workload(
    "tiny", "logistic", 10_000, 1000, 20, (60,), batch=10, lr=0.1, data="linear", proof_rounds=1000, tolerance=1e-4
)
NAMES = ("tiny", "cifar", "digits", "domains", "tiny-K")


def workload(name: str) -> Workload:
    """A workload by name; ``tiny-100000`` is ``tiny`` with that many clients a round.

    Raises:
        SystemExit: no such workload, with the names there are.
    """
    known = {w.name: w for w in (CIFAR, DIGITS, DOMAINS, TINY)}
    if name in known:
        return known[name]
    kind, _, count = name.partition("-")
    if kind == "tiny" and count.isdecimal() and int(count):
        return replace(TINY, name=name, clients=max(TINY.clients, int(count)), cohort=int(count))
    raise SystemExit(f"workload '{name}': no such workload; expected one of {', '.join(NAMES)} with K clients a round")


def cache() -> Path:
    """$BENCH_DATA, else fedsim-bench/data in the user's cache folder."""
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get("BENCH_DATA", home / "fedsim-bench" / "data"))


def folder(workload: Workload) -> Path:
    """The workload's own folder; another definition of it gets another one. ``tiny-K`` of equal data share theirs."""
    drawn = (workload.data, workload.model, workload.clients, workload.examples, workload.shape, workload.domains)
    digest = hashlib.sha256(repr(drawn).encode()).hexdigest()[:8]
    return cache() / f"{workload.name.partition('-')[0]}-{workload.clients}-{digest}"


def prepare(workload: Workload) -> Path:
    """Draw the data and the initial weights, once.

    Raises:
        SystemExit: the workload's data come from fedsim's digits suite and have not been exported.
    """
    target = folder(workload)
    if target.exists():
        return target
    if workload.data == "suite":
        raise SystemExit(f"{target}: not there; make it by: python -m experiments.bench.export_suite {workload.name}")
    draw = {"linear": _linear, "prototypes": _prototypes}[workload.data]
    return write(workload, draw)


def write(workload: Workload, draw) -> Path:
    """Write a workload's folder, whole or not at all.

    Args:
        draw: (workload, first client, number of clients) -> x float32 [clients, examples, *shape], y int64.
    """
    target = folder(workload)
    temporary = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        head = (workload.clients, workload.examples)
        create = np.lib.format.open_memmap
        x = create(temporary / "x.npy", mode="w+", dtype=np.float32, shape=(*head, *workload.shape))
        y = create(temporary / "y.npy", mode="w+", dtype=np.int64, shape=head)
        for start in range(0, workload.clients, CHUNK):
            stop = min(start + CHUNK, workload.clients)
            x[start:stop], y[start:stop] = draw(workload, start, stop - start)
        x.flush()
        y.flush()
        np.savez(temporary / "initial.npz", **_initial(workload))  # type: ignore[arg-type]
        if not target.exists():
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def load(workload: Workload) -> tuple[np.ndarray, np.ndarray]:
    """x float32 [clients, examples, *shape], y int64 [clients, examples]: mapped into memory, writes stay private."""
    source = prepare(workload)
    return np.load(source / "x.npy", mmap_mode="c"), np.load(source / "y.npy", mmap_mode="c")


def initial(workload: Workload) -> dict[str, np.ndarray]:
    """Initial weights, named and laid out as ``torch_side.build_model`` does."""
    with np.load(prepare(workload) / "initial.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


def cohort(workload: Workload, round: int) -> list[int]:
    """The clients of a round (1-based), ascending."""
    if workload.cohort == workload.clients:
        return list(range(workload.clients))
    draw = np.random.default_rng([5000, round])
    return sorted(draw.choice(workload.clients, workload.cohort, replace=False).tolist())


def judges(workload: Workload) -> list[int]:
    """The clients whose examples the final training loss is measured on; of every domain some."""
    count = {"logistic": 1000, "mcmahan-cnn": 40, "digits-cnn": 5}[workload.model]
    return list(range(0, workload.clients, max(1, workload.clients // count)))[:count]


def _linear(workload: Workload, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    features = workload.shape[0]
    truth = np.random.default_rng(13).standard_normal((CLASSES, features), dtype=np.float32)
    draw = np.random.default_rng([13, start])
    x = draw.standard_normal((count, workload.examples, features), dtype=np.float32)
    noise = draw.standard_normal((count, workload.examples, CLASSES), dtype=np.float32)
    return x, (x @ truth.T + 2 * noise).argmax(-1)


def _prototypes(workload: Workload, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise around one coarse pattern a class."""
    c, h, w = workload.shape
    coarse = np.random.default_rng(11).standard_normal((CLASSES, c, h // 4, w // 4), dtype=np.float32)
    patterns = coarse.repeat(4, axis=2).repeat(4, axis=3)
    draw = np.random.default_rng([11, start])
    y = draw.integers(CLASSES, size=(count, workload.examples))
    x = draw.standard_normal((count, workload.examples, *workload.shape), dtype=np.float32)
    x += 0.25 * patterns[y]
    return x, y


def _initial(workload: Workload) -> dict[str, np.ndarray]:
    """Uniform in +-1 / sqrt(fan in), as torch's layers are by default; gamma 1, beta 0."""
    draw = np.random.default_rng(7)

    def layer(number: int, *shape: int) -> dict[str, np.ndarray]:
        bound = 1 / np.sqrt(np.prod(shape[1:]))
        weight, bias = (draw.uniform(-bound, bound, s).astype(np.float32) for s in (shape, shape[:1]))
        return {f"{number}.weight": weight, f"{number}.bias": bias}

    def norm(number: int, width: int) -> dict[str, np.ndarray]:
        return {f"{number}.weight": np.ones(width, np.float32), f"{number}.bias": np.zeros(width, np.float32)}

    if workload.model == "logistic":
        return layer(0, CLASSES, *workload.shape)
    channels, height, width = workload.shape
    area = (height // 4) * (width // 4)
    if workload.model == "mcmahan-cnn":
        return layer(0, 32, channels, 5, 5) | layer(3, 64, 32, 5, 5) | layer(7, 512, 64 * area) | layer(9, CLASSES, 512)
    convolutions = layer(0, 64, channels, 5, 5) | norm(1, 64) | layer(4, 64, 64, 5, 5) | norm(5, 64)
    convolutions |= layer(8, 128, 64, 5, 5) | norm(9, 128)
    dense = layer(12, 2048, 128 * area) | norm(13, 2048) | layer(15, 512, 2048) | norm(16, 512)
    return convolutions | dense | layer(18, CLASSES, 512)
