"""The folder of arrays: identity, pickling without the arrays, memory maps, damage, what it refuses to write."""

import multiprocessing
import pickle

import numpy as np
import pytest

from fedsim.data import Dataset, load_dataset
from fedsim.data.dataset import BLOCK, _publish, cache_folder
from fedsim.errors import ConfigError, DataError
from tests.conftest import DOMAINS, small_dataset


def test_slices_and_shapes(dataset):
    assert dataset.shape == (3, 12, 12)
    rows = np.concatenate([dataset.slice(d, "train") for d in DOMAINS])
    assert np.array_equal(np.sort(rows), np.arange(len(dataset.x_train)))
    assert all((dataset.domain_train[dataset.slice(d, "train")] == i).all() for i, d in enumerate(DOMAINS))
    with pytest.raises(DataError, match="no domain 'scam' with a split 'train'; it has domains photo, sketch, scan"):
        dataset.slice("scam", "train")


def test_a_pickle_carries_the_folder_and_the_arrays_stay_mapped(dataset):
    data = pickle.dumps(dataset)
    assert len(data) < 500
    again = pickle.loads(data)
    assert isinstance(again.x_train, np.memmap)
    assert not again.x_train.flags.writeable
    assert np.array_equal(again.x_train, dataset.x_train)


def _total(dataset):
    return type(dataset.x_test).__name__, int(dataset.x_test.sum(dtype=np.int64))


def test_another_process_maps_the_same_arrays(dataset):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_total, (dataset,)) == _total(dataset)


def test_the_checksum_is_of_the_content(tmp_path, dataset):
    assert small_dataset(tmp_path / "same").digest == dataset.digest
    assert small_dataset(tmp_path / "other", per_domain=39).digest != dataset.digest


@pytest.mark.parametrize("dtype", ["uint8", "float32", "int64"])
def test_more_than_a_block_of_every_kind(tmp_path, dtype):
    x = np.arange((BLOCK + 3) * 4).reshape(-1, 4).astype(dtype)
    y = np.arange(len(x)) % 2
    ticks = []
    arrays = {d: {"train": (x, y), "test": (x[::-1], y)} for d in "ab"}
    data = Dataset.from_arrays("n", tmp_path / "d", arrays, ("u", "v"), tick=ticks.append)
    assert data.x_train.dtype == dtype
    assert np.array_equal(data.x_train, np.concatenate([x, x]))
    assert np.array_equal(data.x_test[: len(x)], x[::-1])
    assert ticks == [BLOCK, 3] * 4


def test_damage_is_named(tmp_path):
    small_dataset(tmp_path / "d")
    (tmp_path / "d" / "train_x.npy").write_bytes(b"junk")
    with pytest.raises(DataError, match="remove the folder"):
        Dataset(tmp_path / "d")


X, Y = np.zeros((2, 3, 8, 8), np.uint8), np.array([0, 1])


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        ((X, np.array([0, 7])), "domain 'b', test: labels are int64 from 0 to 7, expected integers 0 to 3"),
        ((X, np.array([-1, 0])), "from -1 to 0"),
        ((X, np.array([0.0, 1.0])), "labels are float64"),
        ((X, Y[:1]), "2 examples but 1 labels"),
        ((X[:0], Y[:0]), "no examples"),
        ((X[:, :1], Y), r"examples are uint8 \(1, 8, 8\), expected uint8 \(3, 8, 8\)"),
        ((X.astype(np.float32), Y), r"examples are float32 \(3, 8, 8\), expected uint8"),
    ],
)
def test_bad_arrays_are_refused_by_domain_and_split(tmp_path, pair, expected):
    arrays = {"a": {"train": (X, Y), "test": (X, Y)}, "b": {"train": (X, Y), "test": pair}}
    with pytest.raises(DataError, match=expected):
        Dataset.from_arrays("n", tmp_path / "d", arrays, tuple("wxyz"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="holds something that is no data set"):
        small_dataset(tmp_path / "home")
    assert (tmp_path / "home" / "thesis.txt").exists()


def test_an_older_data_set_is_replaced_and_a_twin_is_kept(tmp_path):
    small_dataset(tmp_path / "d", per_domain=20)
    first = small_dataset(tmp_path / "d")
    assert len(first.x_train) == 120
    inode = (tmp_path / "d").stat().st_ino
    small_dataset(tmp_path / "twin")  # as another process would that built the same at the same time
    _publish(tmp_path / "twin", tmp_path / "d")
    assert (tmp_path / "d").stat().st_ino == inode


def test_unknown_names_and_missing_roots():
    with pytest.raises(ConfigError, match="did you mean 'digits'"):
        load_dataset("digit")
    with pytest.raises(ConfigError, match="known: digits, digits-five"):
        load_dataset("cifar")
    with pytest.raises(ConfigError, match=r"set federation\.root"):
        load_dataset("folder")
    with pytest.raises(ConfigError, match="options of 'digits' alone"):
        load_dataset("folder", "x", train_per_domain=3)


def test_where_the_cache_is(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("FEDSIM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "fedsim"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "fedsim"
