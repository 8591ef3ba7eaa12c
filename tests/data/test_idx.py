"""IDX files: plain or compressed, and damaged in every part."""

import gzip
import struct

import numpy as np
import pytest

from fedsim.data import load_dataset
from fedsim.data.idx import read_idx
from fedsim.errors import DataError


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


IMAGES, LABELS = np.arange(4 * 6 * 5, dtype=np.uint8).reshape(4, 6, 5), np.array([0, 1, 2, 1], np.uint8)


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "fashion"
    folder.mkdir()
    for prefix in ("train", "t10k"):
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(IMAGES)))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(LABELS))
    return folder


def test_one_domain_named_after_the_folder(root, monkeypatch):
    data = load_dataset("idx", root, progress=False)
    assert (data.domains, data.shape, data.classes) == (("fashion",), (1, 6, 5), ("0", "1", "2"))
    assert (data.mean, data.std) == ((0.5,), (0.5,))
    assert np.array_equal(data.x_train[:, 0], IMAGES)
    assert data.y_test.tolist() == LABELS.tolist()
    monkeypatch.chdir(root)
    assert load_dataset("idx", ".", progress=False).domains == ("fashion",)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "it begins with nothing"),
        (b"\x89PNG", "no IDX file of unsigned bytes"),
        (idx(LABELS)[:6], "ends inside its header"),
        (idx(LABELS)[:-1], "holds 3 values, its header promises 4"),
        (b"\x00\x00\x08\x04" + b"\xff" * 16, r"its header promises \d{30,}"),
        (idx(IMAGES), r"shape \(4, 6, 5\), expected 1 axes"),
        (idx(LABELS[:0]), "not empty"),
        (idx(LABELS[:3]), "4 examples but 3 labels"),
    ],
)
def test_damaged_labels(root, content, expected):
    (root / "t10k-labels-idx1-ubyte").write_bytes(content)
    with pytest.raises(DataError, match=expected):
        load_dataset("idx", root, progress=False)


def test_damaged_compression_and_missing_files(root):
    path = root / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for damage in (b"", whole[:-9], whole[:12] + b"\xff\xff\xff" + whole[15:]):
        path.write_bytes(damage)
        with pytest.raises(DataError, match=r"ubyte\.gz"):
            read_idx(path)
    path.unlink()
    with pytest.raises(DataError, match="train-images-idx3-ubyte is missing"):
        load_dataset("idx", root, progress=False)
