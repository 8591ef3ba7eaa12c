"""The user's own copies: small trees in each layout, and everything that can be wrong with them."""

import gzip
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedsim.data import load_dataset
from fedsim.data.fedbn import DIGITS, OFFICE, OFFICE_CLASSES, read_pair
from fedsim.data.images import inside
from fedsim.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))


def image(path: Path, value: int = 100, size: tuple[int, int] = (10, 9), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value, 0, 0)).save(path)


@pytest.fixture
def tree(tmp_path) -> Path:
    """PACS in small: two domains, two classes, ten images each."""
    root = tmp_path / "pacs"
    for domain in ("photo", "art painting"):
        for label, name in enumerate(("dog", "house")):
            for i in range(10):
                image(root / domain / name / f"{i}.jpg", 40 * label + i, mode="L" if i == 0 else "RGB")
    return root


def test_a_folder_tree_is_split_by_class_and_says_so(tree, capsys):
    data = load_dataset("folder", str(tree), image_size=8)
    assert data.domains == ("art painting", "photo")
    assert data.classes == ("dog", "house")
    assert data.shape == (3, 8, 8)
    for domain in data.domains:
        assert np.bincount(data.y_test[data.slice(domain, "test")]).tolist() == [2, 2]
        assert np.bincount(data.y_train[data.slice(domain, "train")]).tolist() == [8, 8]
    assert "a fifth of each class" in capsys.readouterr().out
    again = load_dataset("folder", str(tree), image_size=8)
    assert again.folder == data.folder
    assert capsys.readouterr().out == "", "read once, then cached"


def test_a_changed_file_is_read_again(tree):
    before = load_dataset("folder", str(tree), image_size=8)
    image(tree / "photo" / "dog" / "new.png")
    assert load_dataset("folder", str(tree), image_size=8).digest != before.digest


def test_split_lists(tree):
    for domain in ("photo", "art painting"):
        (tree / f"{domain}_train.txt").write_text(f"{domain}/dog/1.jpg 0\n{domain}/house/2.jpg 1\n")
        (tree / f"{domain}_test.txt").write_text(f"{domain}/dog/3.jpg 0\n")
    data = load_dataset("folder", str(tree), image_size=8)
    assert data.y_train.tolist() == [0, 1, 0, 1]
    assert len(data.x_test) == 2


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("photo/dog/1.jpg", "expected 'relative/path label'"),
        ("photo/dog/1.jpg 2", "count from 1"),
        ("photo/dog/none.jpg 0", "does not exist"),
        ("../../../etc/passwd 0", "leads out of this folder"),
    ],
)
def test_bad_split_lists(tree, line, expected):
    (tree / "photo_train.txt").write_text(line + "\n")
    (tree / "photo_test.txt").write_text("photo/dog/1.jpg 0\n")
    with pytest.raises(DataError, match=expected):
        load_dataset("folder", str(tree), image_size=8)


def test_missing_and_unreadable(tree, tmp_path):
    with pytest.raises(DataError, match="does not exist; expected a folder with domain folders"):
        load_dataset("folder", str(tmp_path / "nowhere"))
    (tree / "photo" / "dog" / "bad.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"bad\.png: cannot be read as an image"):
        load_dataset("folder", str(tree))
    (tree / "empty").mkdir()
    with pytest.raises(DataError, match="no class folders"):
        load_dataset("folder", str(tree))


def test_a_link_out_of_the_root_is_refused(tree, tmp_path):
    image(tmp_path / "secret.png")
    os.symlink(tmp_path / "secret.png", tree / "photo" / "dog" / "link.png")
    with pytest.raises(DataError, match="leads out"):
        load_dataset("folder", str(tree))
    with pytest.raises(DataError, match="leads out"):
        inside(tree, "/etc/passwd")


@pytest.fixture
def digit_package(tmp_path) -> Path:
    """FedBN's digit_dataset in small, with the raw sizes of its sources."""
    root, draw = tmp_path / "digits", np.random.default_rng(0)
    shapes = {
        "MNIST": (28, 28),
        "SVHN": (32, 32, 3),
        "USPS": (16, 16),
        "SynthDigits": (32, 32, 3),
        "MNIST_M": (28, 28, 3),
    }
    for folder, shape in shapes.items():
        (root / folder / "partitions").mkdir(parents=True)
        for file, count in (("partitions/train_part0.pkl", 12), ("test.pkl", 6)):
            pair = (draw.integers(0, 255, (count, *shape), np.uint8), np.arange(count, dtype=np.int64)[:, None] % 10)
            (root / folder / file).write_bytes(pickle.dumps(pair, pickle.HIGHEST_PROTOCOL))
    return root


def test_digits_five(digit_package):
    data = load_dataset("digits-five", str(digit_package))
    assert data.domains == tuple(DIGITS)
    assert data.shape == (3, 28, 28)
    assert (len(data.x_train), len(data.x_test)) == (60, 30)
    grey = data.x_train[data.slice("usps", "train")]
    assert np.array_equal(grey[:, 0], grey[:, 2])


def test_office_caltech(tmp_path):
    for domain in OFFICE:
        for split in ("train", "test"):
            files = [f"office_caltech_10/{domain}/{name}/{split}.jpg" for name in OFFICE_CLASSES[:3]]
            for file in files:
                image(tmp_path / file)
            pair = (np.array(files), np.array(OFFICE_CLASSES[:3]))
            (tmp_path / "office_caltech_10" / f"{domain}_{split}.pkl").write_bytes(pickle.dumps(pair, 2))
    data = load_dataset("office-caltech-10", str(tmp_path), image_size=16)
    assert data.domains == OFFICE
    assert data.y_train.tolist() == [0, 1, 2] * 4
    assert (data.mean, data.std) == ((0.0,) * 3, (1.0,) * 3)
    (tmp_path / "office_caltech_10" / "dslr" / "bike" / "train.jpg").unlink()
    with pytest.raises(DataError, match=r"train\.jpg: this image is listed but does not exist"):
        load_dataset("office-caltech-10", str(tmp_path), image_size=16)
    pair = (np.array(["office_caltech_10/x.jpg"]), np.array(["backpack"]))
    (tmp_path / "office_caltech_10" / "amazon_train.pkl").write_bytes(pickle.dumps(pair))
    with pytest.raises(DataError, match="unknown class 'backpack'; expected one of back_pack"):
        load_dataset("office-caltech-10", str(tmp_path), image_size=16)


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/fedsim-was-here",)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Evil(), "posix.system"),
        ({"a": 1}, "holds dict"),
        ((np.zeros(2), np.zeros(3)), "2 examples but 3 labels"),
        ((np.zeros(2), [1, 2]), "expected a pair of numpy arrays"),
        ((np.array([Evil()], object), np.zeros(1)), "posix.system"),
    ],
)
def test_the_unpickler_admits_arrays_only(tmp_path, value, expected):
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(value))
    with pytest.raises(DataError, match=expected):
        read_pair(path)
    assert not Path("/tmp/fedsim-was-here").exists()


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_of_a_true_pair(tmp_path, protocol):
    pair = (np.arange(6, dtype=np.uint8).reshape(2, 3), np.array(["cat", "dog"]))
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(pair, protocol))
    assert all(map(np.array_equal, read_pair(tmp_path / "x.pkl"), pair))


def test_truncated_pickles(tmp_path):
    data = pickle.dumps((np.zeros(2), np.zeros(2)))
    for length in (0, 1, len(data) // 2, len(data) - 1):
        (tmp_path / "x.pkl").write_bytes(data[:length])
        with pytest.raises(DataError, match="refused"):
            read_pair(tmp_path / "x.pkl")


def test_idx_files(tmp_path):
    root = tmp_path / "fashion"
    root.mkdir()
    x, y = np.arange(4 * 6 * 5, dtype=np.uint8).reshape(4, 6, 5), np.array([0, 1, 2, 1], np.uint8)
    for prefix in ("train", "t10k"):
        images = b"\x00\x00\x08\x03" + struct.pack(">3I", 4, 6, 5) + x.tobytes()
        (root / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (root / f"{prefix}-labels-idx1-ubyte").write_bytes(b"\x00\x00\x08\x01" + struct.pack(">I", 4) + y.tobytes())
    data = load_dataset("idx", str(root))
    assert (data.domains, data.shape, len(data.classes)) == (("fashion",), (1, 6, 5), 3)
    assert np.array_equal(data.x_train[:, 0], x)
    (root / "t10k-labels-idx1-ubyte").write_bytes(b"\x00\x00\x08\x01" + struct.pack(">I", 9) + y.tobytes())
    with pytest.raises(DataError, match="holds 4 values, its header promises 9"):
        load_dataset("idx", str(root))
    (root / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte is missing"):
        load_dataset("idx", str(root))
