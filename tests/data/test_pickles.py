"""The restricted unpickler: arrays and strings come through at every protocol, everything else is refused by name."""

import pickle

import numpy as np
import pytest

from fedsim.data.pickles import read_pair
from fedsim.errors import DataError
from tests.data.conftest import Evil


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "pair",
    [
        (np.arange(6, dtype=np.uint8).reshape(2, 3), np.array(["cat", "dog"])),
        (np.array(["a/b.jpg", "ü.png"], object), np.array([1.0, 2.0])),
        (np.asfortranarray(np.ones((2, 3))), np.arange(4)[::2]),
    ],
)
def test_every_protocol_of_a_true_pair(tmp_path, pair, protocol):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(pair, protocol))
    assert all(map(np.array_equal, read_pair(tmp_path / "x.pkl"), pair))


class Codec:
    def __reduce__(self):
        import _codecs

        return _codecs.encode, ("text", "zlib")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Evil(), "posix.system"),
        ((np.array([Evil()], object), np.zeros(1)), "posix.system"),
        (Codec(), "the codec 'zlib'"),
        ({"a": 1}, "holds dict"),
        ((np.zeros(2), [1, 2]), "expected a pair of numpy arrays"),
        ((np.array(1), np.array(1)), "expected a pair of numpy arrays"),
        ((np.zeros(2), np.zeros(3)), "2 examples but 3 labels"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_everything_else_is_refused(tmp_path, monkeypatch, value, expected, protocol):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(value, protocol))
    # Protocol 0 names copyreg._reconstructor for arrays: refused as well, only earlier.
    with pytest.raises(DataError, match=expected if protocol else r"refused|holds|expected|2 examples"):
        read_pair(tmp_path / "x.pkl")
    assert not (tmp_path / Evil.marker).exists()


@pytest.mark.parametrize("name", ["eval", "exec", "getattr", "__import__", "open"])
def test_builtins_are_refused(tmp_path, name):
    (tmp_path / "x.pkl").write_bytes(f"cbuiltins\n{name}\n.".encode())
    with pytest.raises(DataError, match=f"it names builtins.{name}"):
        read_pair(tmp_path / "x.pkl")


def test_truncated_and_missing(tmp_path):
    data = pickle.dumps((np.zeros(2), np.zeros(2)))
    for length in (0, 1, len(data) // 2, len(data) - 1):
        (tmp_path / "x.pkl").write_bytes(data[:length])
        with pytest.raises(DataError, match="refused"):
            read_pair(tmp_path / "x.pkl")
    with pytest.raises(DataError, match=r"none\.pkl: does not exist; expected as in FedBN"):
        read_pair(tmp_path / "none.pkl")
