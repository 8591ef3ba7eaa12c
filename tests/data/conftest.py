import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedsim.data import Dataset
from fedsim.data.digits import build_digits


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Nothing is read from the user's cache or written to it."""
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def digits():
    """A small suite, all domains, in one process."""
    return build_digits(0, train=12, test=15, workers=1)


@pytest.fixture(scope="session")
def suite(digits, tmp_path_factory) -> Dataset:
    return Dataset.from_arrays("digits", tmp_path_factory.mktemp("digits"), digits, tuple("0123456789"))


@pytest.fixture
def write_image():
    """A function that writes an image of one colour, and the folders above it."""

    def write(path: Path, value: int = 100, size: tuple[int, int] = (10, 9), mode: str = "RGB") -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, size, value if mode == "L" else (value, 0, 0)).save(path)

    return write


@pytest.fixture
def tree(tmp_path, write_image) -> Path:
    """PACS in small: two domains, two classes, ten images each."""
    root = tmp_path / "pacs"
    for domain in ("photo", "art painting"):
        for label, name in enumerate(("dog", "house")):
            for i in range(10):
                write_image(root / domain / name / f"{i}.jpg", 40 * label + i, mode="L" if i == 0 else "RGB")
    return root


class Labels:
    """A data set without images: partitions look at labels and domains only."""

    name, domains = "labels", ("a", "b")

    def __init__(self, count: int = 600, classes: int = 10):
        draw = np.random.default_rng(0)
        self.y_train = draw.integers(0, classes, count)
        self.domain_train = (np.arange(count) >= count // 3).astype(np.int16)

    def slice(self, domain, split):
        return np.flatnonzero(self.domain_train == self.domains.index(domain))


class Evil:
    """Runs a command when it is unpickled."""

    marker = "fedsim-was-here"

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)
