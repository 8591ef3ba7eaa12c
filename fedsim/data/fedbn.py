"""Digits-Five, Office-Caltech-10 and DomainNet-10 in the layout FedBN released (Li et al., ICLR 2021).

digits:  <root>/<DOMAIN>/{train,test}.pkl and partitions/train_part0.pkl: (images, labels)
others:  <root>/<set>/<domain>_{train,test}.pkl: (paths relative to root, class names)
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from fedsim.data.dataset import Arrays
from fedsim.data.images import ImageFiles, inside, need_folder
from fedsim.data.pickles import read_pair
from fedsim.data.tree import load_tree
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


def _digit_images(path: Path, x: np.ndarray) -> np.ndarray:
    """uint8 [N, 3, 28, 28] of grey or coloured images of any size."""
    if x.dtype != np.uint8 or x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[3] != 3):
        raise DataError(f"{path}: images are {x.dtype} {x.shape}, expected uint8 [N, H, W] or [N, H, W, 3]")
    if x.shape[1:3] != (28, 28):
        x = np.stack([np.asarray(Image.fromarray(i).resize((28, 28), Image.Resampling.BILINEAR)) for i in x])
    if x.ndim == 3:
        return np.repeat(x[:, None], 3, axis=1)
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2))


def _digit_labels(path: Path, y: np.ndarray) -> np.ndarray:
    """int64 [N]; the package has some of shape [N, 1] and some of floats."""
    if y.dtype.kind not in "iuf" or not np.isfinite(y).all() or not np.array_equal(y, np.round(y)):
        raise DataError(f"{path}: labels are {y.dtype}, expected whole numbers 0 to 9")
    return y.reshape(-1).astype(np.int64)


def load_digits_five(root: Path) -> tuple[Arrays, tuple[str, ...]]:
    """743 training images a domain (part 0 of the ten partitions: the "10 %" of the paper), the whole test set."""
    need_folder(root, f"FedBN's digit_dataset.zip unpacked: {', '.join(DIGITS.values())}")
    if (root / "mnist_data.mat").exists():
        raise DataError(
            f"{root}: this is the Digits-Five of M3SDA (.mat files), which holds other images; expected FedBN's"
            f" digit_dataset.zip unpacked: {', '.join(DIGITS.values())}"
        )
    arrays: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for domain, folder in DIGITS.items():
        arrays[domain] = {}
        for split, file in (("train", "partitions/train_part0.pkl"), ("test", "test.pkl")):
            path = root / folder / file
            x, y = read_pair(path)
            arrays[domain][split] = (_digit_images(path, x), _digit_labels(path, y))
    return arrays, tuple(str(d) for d in range(10))


def load_office(root: Path, size: int, seed: int) -> tuple[Arrays, tuple[str, ...]]:
    """FedBN's package, or a plain tree of the images without its pickles: then split by the seed, which is said."""
    plain = next((f for f in (root / "office_caltech_10", root) if (f / OFFICE[0]).is_dir()), None)
    if plain and not list(plain.glob("*.pkl")):
        return load_tree(plain, size, seed, OFFICE, OFFICE_CLASSES, {"backpack": "back_pack"})
    return _load_paths(root, "office_caltech_10", OFFICE, OFFICE_CLASSES, size)


def load_domainnet(root: Path, size: int) -> tuple[Arrays, tuple[str, ...]]:
    """The ten classes of FedBN's pickles; the images are DomainNet's own zips, unpacked under DomainNet/."""
    return _load_paths(root, "DomainNet", DOMAINNET, DOMAINNET_CLASSES, size)


def _load_paths(
    root: Path, name: str, domains: tuple[str, ...], classes: tuple[str, ...], size: int
) -> tuple[Arrays, tuple[str, ...]]:
    need_folder(root, f"FedBN's package unpacked: {name}/{domains[0]}_train.pkl and the images")
    arrays: dict[str, dict[str, tuple[ImageFiles, np.ndarray]]] = {}
    for domain in domains:
        arrays[domain] = {}
        for split in ("train", "test"):
            path = root / name / f"{domain}_{split}.pkl"
            files, labels = read_pair(path)
            unknown = sorted({str(label) for label in labels} - set(classes))
            if unknown:
                raise DataError(f"{path}: unknown class '{unknown[0]}'; expected one of {', '.join(classes)}")
            images = ImageFiles([inside(root, str(f)) for f in files], size)
            arrays[domain][split] = (images, np.array([classes.index(str(label)) for label in labels], np.int64))
    return arrays, classes
