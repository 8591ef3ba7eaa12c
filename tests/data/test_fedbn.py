"""FedBN's packages in small: their layout, their quirks, and what can be wrong with them."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from fedsim.data import load_dataset
from fedsim.data.fedbn import DIGITS, DOMAINNET, DOMAINNET_CLASSES, OFFICE, OFFICE_CLASSES
from fedsim.errors import DataError

SHAPES = {"MNIST": (28, 28), "SVHN": (32, 32, 3), "USPS": (16, 16), "SynthDigits": (32, 32, 3), "MNIST_M": (28, 28, 3)}


@pytest.fixture
def package(tmp_path) -> Path:
    """digit_dataset with the raw sizes of its sources; labels of several shapes and types, as in the original."""
    root, draw = tmp_path / "digits", np.random.default_rng(0)
    for folder, shape in SHAPES.items():
        (root / folder / "partitions").mkdir(parents=True)
        for file, count in (("partitions/train_part0.pkl", 12), ("test.pkl", 6)):
            labels = np.arange(count) % 10
            labels = {"SVHN": labels[:, None], "USPS": labels.astype(np.float64)}.get(folder, labels)
            pair = (draw.integers(0, 255, (count, *shape), np.uint8), labels)
            (root / folder / file).write_bytes(pickle.dumps(pair, pickle.HIGHEST_PROTOCOL))
    return root


def test_digits_five(package):
    data = load_dataset("digits-five", package, progress=False)
    assert data.domains == tuple(DIGITS) == ("mnist", "svhn", "usps", "synthdigits", "mnistm")
    assert (data.shape, data.mean, data.std) == ((3, 28, 28), (0.5,) * 3, (0.5,) * 3)
    assert (len(data.x_train), len(data.x_test)) == (60, 30)
    assert data.y_train[data.slice("svhn", "train")].tolist() == data.y_train[data.slice("usps", "train")].tolist()
    grey = data.x_train[data.slice("usps", "train")]
    assert np.array_equal(grey[:, 0], grey[:, 2])


@pytest.mark.parametrize(
    ("images", "labels", "expected"),
    [
        (np.zeros((2, 28, 28), np.float32), np.arange(2), "images are float32"),
        (np.zeros((2, 784), np.uint8), np.arange(2), r"expected uint8 \[N, H, W\]"),
        (np.zeros((2, 28, 28), np.uint8), np.array(["a", "b"]), "labels are <U1, expected whole numbers"),
        (np.zeros((2, 28, 28), np.uint8), np.array([0.5, 1]), "expected whole numbers"),
        (np.zeros((2, 28, 28), np.uint8), np.array([1, 10]), "domain 'mnist', test: labels are int64 from 1 to 10"),
    ],
)
def test_digits_that_are_not(package, images, labels, expected):
    (package / "MNIST" / "test.pkl").write_bytes(pickle.dumps((images, labels)))
    with pytest.raises(DataError, match=expected):
        load_dataset("digits-five", package, progress=False)


def test_missing_parts_are_named(package, tmp_path):
    (package / "USPS" / "test.pkl").unlink()
    with pytest.raises(DataError, match=r"USPS/test\.pkl: does not exist"):
        load_dataset("digits-five", package, progress=False)
    with pytest.raises(DataError, match="expected a folder with FedBN's digit_dataset"):
        load_dataset("digits-five", tmp_path / "nowhere", progress=False)
    (tmp_path / "peng").mkdir()
    (tmp_path / "peng" / "mnist_data.mat").touch()
    with pytest.raises(DataError, match="the Digits-Five of M3SDA"):
        load_dataset("digits-five", tmp_path / "peng", progress=False)


def path_package(root: Path, name: str, domains: tuple[str, ...], classes: tuple[str, ...], write_image) -> None:
    for domain in domains:
        for split in ("train", "test"):
            files = [f"{name}/{domain}/{c}/{split}.jpg" for c in classes]
            for file in files:
                write_image(root / file)
            (root / name / f"{domain}_{split}.pkl").write_bytes(pickle.dumps((np.array(files), np.array(classes)), 2))


@pytest.mark.parametrize(
    ("dataset", "name", "domains", "classes"),
    [
        ("office-caltech-10", "office_caltech_10", OFFICE, OFFICE_CLASSES),
        ("domainnet-10", "DomainNet", DOMAINNET, DOMAINNET_CLASSES),
    ],
)
def test_packages_of_paths(tmp_path, write_image, dataset, name, domains, classes):
    path_package(tmp_path, name, domains, classes[:3], write_image)
    data = load_dataset(dataset, tmp_path, image_size=16, progress=False)
    assert (data.domains, data.classes, data.shape) == (domains, classes, (3, 16, 16))
    assert data.y_train.tolist() == [0, 1, 2] * len(domains)
    assert (data.mean, data.std) == ((0.0,) * 3, (1.0,) * 3)


def test_what_can_be_wrong_with_paths(tmp_path, write_image):
    path_package(tmp_path, "office_caltech_10", OFFICE, OFFICE_CLASSES[:2], write_image)
    listing = tmp_path / "office_caltech_10" / "amazon_train.pkl"

    def load(file: str, label: str) -> None:
        listing.write_bytes(pickle.dumps((np.array([file]), np.array([label]))))
        load_dataset("office-caltech-10", tmp_path, image_size=16, progress=False)

    with pytest.raises(DataError, match=r"none\.jpg: this image is listed but does not exist"):
        load("office_caltech_10/amazon/bike/none.jpg", "bike")
    with pytest.raises(DataError, match="unknown class 'backpack'; expected one of back_pack"):
        load("office_caltech_10/amazon/bike/train.jpg", "backpack")
    for outside in ("../secret.jpg", "/etc/passwd", "office_caltech_10/../../secret.jpg"):
        with pytest.raises(DataError, match="leads out of this folder"):
            load(outside, "bike")


def test_office_without_its_pickles_is_split_by_the_seed(tmp_path, write_image, capsys):
    for domain in OFFICE:
        for name in ("backpack", "mug"):  # a mirror's spelling of back_pack
            for i in range(5):
                write_image(tmp_path / "office_caltech_10" / domain / name / f"{i}.jpg")
    write_image(tmp_path / "office_caltech_10" / "caltech_manual" / "mug" / "0.jpg")  # another mirror's extra folder
    data = load_dataset("office-caltech-10", tmp_path, image_size=16, progress=False)
    assert (data.domains, data.classes) == (OFFICE, OFFICE_CLASSES)
    assert np.bincount(data.y_train, minlength=10).tolist() == [16, 0, 0, 0, 0, 0, 0, 0, 16, 0]
    assert "a fifth of each class" in capsys.readouterr().err
