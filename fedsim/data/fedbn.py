"""Digits-Five, Office-Caltech-10 and DomainNet-10 in the layout FedBN released (Li et al., ICLR 2021).

Their pickles hold a pair of arrays. They are read by an unpickler that can make numpy arrays and strings and nothing
else: a pickle can call any function it names, and these come from the network.

    digits:  <root>/<DOMAIN>/{train,test}.pkl and partitions/train_part0.pkl: (images, labels)
    others:  <root>/<set>/<domain>_{train,test}.pkl: (paths relative to root, class names)
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fedsim.data.images import inside, need_folder, read_images
from fedsim.errors import DataError

DIGITS = {"mnist": "MNIST", "svhn": "SVHN", "usps": "USPS", "synthdigits": "SynthDigits", "mnistm": "MNIST_M"}
OFFICE = ("amazon", "caltech", "dslr", "webcam")
OFFICE_CLASSES = (
    "back_pack",
    "bike",
    "calculator",
    "headphones",
    "keyboard",
    "laptop_computer",
    "monitor",
    "mouse",
    "mug",
    "projector",
)
DOMAINNET = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
DOMAINNET_CLASSES = (
    "bird",
    "feather",
    "headphones",
    "ice_cream",
    "teapot",
    "tiger",
    "whale",
    "windmill",
    "wine_glass",
    "zebra",
)
Arrays = dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]


class ArraysOnly(pickle.Unpickler):
    """Admits what numpy arrays of numbers and strings are made of."""

    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy._core.multiarray", "scalar"),
        ("numpy.core.numeric", "_frombuffer"),
        ("numpy._core.numeric", "_frombuffer"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),  # how protocol 2 spells bytes
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of an array")


def read_pair(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The pair of arrays in one of FedBN's pickles.

    Raises:
        DataError: missing, damaged, or holding anything but two arrays of equal length.
    """
    try:
        value = ArraysOnly(io.BytesIO(path.read_bytes())).load()
    except FileNotFoundError:
        raise DataError(f"{path}: does not exist; expected as in FedBN's released package") from None
    except Exception as error:  # a damaged pickle raises whatever its last opcode happens to raise
        raise DataError(f"{path}: refused: {error}; expected a pickled pair of numpy arrays") from None
    if not (isinstance(value, tuple) and len(value) == 2 and all(isinstance(a, np.ndarray) for a in value)):
        raise DataError(f"{path}: holds {type(value).__name__}, expected a pair of numpy arrays")
    if len(value[0]) != len(value[1]):
        raise DataError(f"{path}: {len(value[0])} examples but {len(value[1])} labels")
    return value


def _digit_images(path: Path, x: np.ndarray) -> np.ndarray:
    """uint8 [N, 3, 28, 28] of grey or coloured images of any size."""
    if x.dtype != np.uint8 or x.ndim not in (3, 4):
        raise DataError(f"{path}: images are {x.dtype} {x.shape}, expected uint8 [N, H, W] or [N, H, W, 3]")
    if x.shape[1:3] != (28, 28):
        x = np.stack([np.asarray(Image.fromarray(i).resize((28, 28), Image.Resampling.BILINEAR)) for i in x])
    if x.ndim == 3:
        return np.repeat(x[:, None], 3, axis=1)
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2))


def load_digits_five(root: Path) -> tuple[Arrays, tuple[str, ...]]:
    """743 training images a domain (part 0 of the ten partitions: the "10 %" of the paper), the whole test set."""
    need_folder(root, f"FedBN's digit_dataset.zip unpacked: {', '.join(DIGITS.values())}")
    arrays: Arrays = {}
    for domain, folder in DIGITS.items():
        arrays[domain] = {}
        for split, file in (("train", "partitions/train_part0.pkl"), ("test", "test.pkl")):
            path = root / folder / file
            x, y = read_pair(path)
            arrays[domain][split] = (_digit_images(path, x), y.reshape(-1).astype(np.int64))
    return arrays, tuple(str(d) for d in range(10))


def load_paths(
    root: Path, name: str, domains: tuple[str, ...], classes: tuple[str, ...], size: int
) -> tuple[Arrays, tuple[str, ...]]:
    """Office-Caltech-10 (``name`` office_caltech_10) and DomainNet-10 (DomainNet)."""
    need_folder(root, f"FedBN's package unpacked: {name}/{domains[0]}_train.pkl and the images")
    arrays: Arrays = {}
    for domain in domains:
        arrays[domain] = {}
        for split in ("train", "test"):
            path = root / name / f"{domain}_{split}.pkl"
            files, labels = read_pair(path)
            unknown = sorted({str(label) for label in labels} - set(classes))
            if unknown:
                raise DataError(f"{path}: unknown class '{unknown[0]}'; expected one of {', '.join(classes)}")
            images = read_images([inside(root, str(f)) for f in files], size)
            arrays[domain][split] = (images, np.array([classes.index(str(label)) for label in labels], np.int64))
    return arrays, classes
