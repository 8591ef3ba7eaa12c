"""Assembling the digits suite.

| domain    | kind        | training / test | how                                                                   |
|-----------|-------------|-----------------|-----------------------------------------------------------------------|
| mnist     | real        | 743 / 1500      | MNIST as it is                                                        |
| utility   | real        | 743 / 1251      | Dutch utility-map digits; true pixel shape restored, 22 of 28 high    |
| optdigits | real        | 743 / 1054      | 8x8 scans enlarged; cut in writing order, so that writers hardly mix  |
| mnistm    | real x real | 743 / 1500      | |photograph - MNIST digit|                                            |
| synth     | rendered    | 743 / 1500      | numbers in 83 faces                                                   |
| street    | rendered    | 743 / 1500      | house numbers; a stand-in for SVHN, not SVHN                          |

743 is FedBN's ten per cent of the smallest domain. Image i of a domain's split depends on (seed, domain, split, i)
alone: not on the counts, not on the number of processes. Train and test share no source: no MNIST digit, no row, no
region of a photograph; mnist and mnistm share no digit either. The rows of optdigits are cut in the order of writing,
so that this domain alone is the same for every seed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from fedsim.data.dataset import SPLITS, Dataset, cache_folder
from fedsim.data.digits.rendered import Drawn, blended, street, synth
from fedsim.data.digits.sources import PACK, real_digits
from fedsim.data.progress import bar
from fedsim.errors import DataError

DOMAINS = ("mnist", "utility", "optdigits", "mnistm", "synth", "street")
DRAWERS: dict[str, Callable[..., Drawn]] = {"synth": synth, "street": street}
RECIPE = 1  # changes whenever an image would; part of every generator's key and of the cache's
TRAIN, TEST = 743, 1500
MNIST_TRAIN = 850  # digits of each of mnist and mnistm that training may use; the other 1650 are for testing
Pool = tuple[np.ndarray, np.ndarray]  # images uint8 [N, h, w], labels int64 [N]


def _pool(domain: str, split: str, seed: int) -> Pool:
    """All the real digits that a domain's split may use, in a fixed order."""
    number = DOMAINS.index(domain)
    order = np.random.default_rng([seed, RECIPE, 100 if domain in ("mnist", "mnistm") else 100 + number])
    if domain in ("mnist", "mnistm"):
        x, y = real_digits("mnist5k.npz", 255)
        half = order.permutation(len(x)).reshape(2, -1)[int(domain == "mnistm")]
        rows = half[:MNIST_TRAIN] if split == "train" else half[MNIST_TRAIN:]
    elif domain == "utility":
        x, y = real_digits("mfeat.npz", 6)
        _, first = np.unique(x.reshape(len(x), -1), axis=0, return_index=True)  # six digits are there twice
        x, y = x[np.sort(first)], y[np.sort(first)]
        per_class = [order.permutation(np.flatnonzero(y == c))[: TRAIN // 10 + (c < TRAIN % 10)] for c in range(10)]
        training = order.permutation(np.concatenate(per_class))
        rest = order.permutation(np.setdiff1d(np.arange(len(y)), training))
        rows = training if split == "train" else rest
    else:
        x, y = real_digits("optdigits.npz", 16)
        rows = np.arange(TRAIN) if split == "train" else np.arange(TRAIN, len(y))
    return x[rows], y[rows]


def _fit(domain: str, image: np.ndarray, size: int) -> np.ndarray:
    """A real digit [h, w] at ``size`` pixels."""
    if domain == "utility":  # each value is the mean of a 3x2 window of a 48x30 bitmap: give it its true shape
        height, width = round(size * 22 / 28), round(size * 22 / 28 * 30 / 48)
        canvas = np.zeros((size, size), np.uint8)
        y, x = (size - height) // 2, (size - width) // 2
        digit = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        canvas[y : y + height, x : x + width] = np.asarray(digit)
        return canvas
    if image.shape == (size, size):
        return image
    how = Image.Resampling.BICUBIC if domain == "optdigits" else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(image).resize((size, size), how))


def _draw(job: tuple[str, str, int, int, int, np.ndarray | None, int]) -> Drawn:
    domain, split, index, seed, size, digit, label = job
    draw = np.random.default_rng([seed, RECIPE, DOMAINS.index(domain), SPLITS.index(split), index])
    if digit is not None:
        return blended(draw, split, _fit("mnist", digit, size)), label
    return DRAWERS[domain](draw, split, size)


def build_digits(
    seed: int = 0,
    *,
    size: int = 28,
    train: int = TRAIN,
    test: int = TEST,
    domains: tuple[str, ...] = DOMAINS,
    workers: int | None = None,
    tick: Callable[[int], None] = lambda count: None,
) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """domain -> split -> (images uint8 [N, 3, size, size], labels int64 [N]).

    Args:
        test: at most so many; optdigits and utility have fewer.
        workers: processes; None: one a core. Their number changes no byte.
        tick: called with the number of images finished.

    Raises:
        DataError: a real domain has fewer training digits than asked for.
    """
    out: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {d: {} for d in domains}
    jobs: list[tuple[str, str, int, int, int, np.ndarray | None, int]] = []
    for domain in domains:
        for split, count in zip(SPLITS, (train, test)):
            if domain in DRAWERS:
                jobs += [(domain, split, i, seed, size, None, -1) for i in range(count)]
                continue
            x, y = _pool(domain, split, seed)
            if split == "train" and count > len(x):
                raise DataError(f"digits, domain '{domain}': {count} training images asked for, {len(x)} exist")
            x, y = x[:count], y[:count]
            if domain == "mnistm":
                jobs += [(domain, split, i, seed, size, x[i], int(y[i])) for i in range(len(x))]
            else:
                images = np.stack([_fit(domain, image, size) for image in x])
                out[domain][split] = (np.repeat(images[:, None], 3, axis=1), y)
    drawn = _map(jobs, workers or cores(), tick)
    for domain in domains:
        for split in SPLITS:
            if split not in out[domain]:
                mine = [d for job, d in zip(jobs, drawn) if job[:2] == (domain, split)]
                images = np.stack([image for image, _ in mine]).transpose(0, 3, 1, 2)
                out[domain][split] = (np.ascontiguousarray(images), np.array([label for _, label in mine]))
    return out


def _map(jobs: list, workers: int, tick: Callable[[int], None]) -> list[Drawn]:
    drawn: list[Drawn] = []
    if workers > 1 and len(jobs) > 1:
        try:
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                for result in pool.map(_draw, jobs, chunksize=32):
                    drawn.append(result)
                    tick(1)
        except BrokenProcessPool:
            pass  # a script without ``if __name__ == "__main__":`` cannot start processes: the rest is drawn here
    for job in jobs[len(drawn) :]:
        drawn.append(_draw(job))
        tick(1)
    return drawn


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _key(seed: int, train: int, domains: tuple[str, ...]) -> str:
    """Hash of everything the images depend on: the pack's bytes and the recipe."""
    digest = hashlib.sha256(f"{RECIPE} {seed} {train} {domains}".encode())
    for file in sorted(PACK.rglob("*")):
        if file.is_file() and file.suffix not in (".md", ".txt"):
            digest.update(file.name.encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def load_digits(
    seed: int = 0, train: int | None = None, domains: Sequence[str] = (), *, progress: bool = True
) -> Dataset:
    """The suite from the cache, built first if it is not there (half a minute on two cores).

    Args:
        train: training images a domain; None: 743. Rendered domains have any number, mnist and mnistm 850, the others
            743.
        domains: build these only; empty: all.

    Raises:
        DataError: an unknown domain, or more training images than one of them has.
    """
    unknown = [d for d in domains if d not in DOMAINS]
    if unknown:
        raise DataError(f"digits: no domain '{unknown[0]}'; it has {', '.join(DOMAINS)}")
    train = TRAIN if train is None else train
    if train < 1:
        raise DataError(f"digits: {train} training images a domain asked for, expected at least 1")
    chosen = tuple(d for d in DOMAINS if not domains or d in domains)
    folder: Path = cache_folder() / f"digits-{_key(seed, train, chosen)}"
    if (folder / "meta.json").exists():
        return Dataset(folder)
    total = sum(train + TEST for d in chosen if d in (*DRAWERS, "mnistm"))
    with bar("drawing the digits suite, once", total, show=progress and total > 0) as tick:
        arrays = build_digits(seed, train=train, test=TEST, domains=chosen, tick=tick)
    return Dataset.from_arrays("digits", folder, arrays, tuple(str(d) for d in range(10)))
