"""The folder of arrays: identity, pickling without the arrays, memory maps, damage."""

import pickle

import numpy as np
import pytest

from fedsim.data import Dataset, load_dataset
from fedsim.errors import ConfigError, DataError
from tests.conftest import DOMAINS, small_dataset


def test_slices_and_shapes(dataset):
    assert dataset.shape == (3, 12, 12)
    rows = np.concatenate([dataset.slice(d, "train") for d in DOMAINS])
    assert np.array_equal(np.sort(rows), np.arange(len(dataset.x_train)))
    assert all((dataset.domain_train[dataset.slice(d, "train")] == i).all() for i, d in enumerate(DOMAINS))


def test_a_pickle_carries_the_folder_and_the_arrays_stay_mapped(dataset):
    data = pickle.dumps(dataset)
    assert len(data) < 500
    again = pickle.loads(data)
    assert isinstance(again.x_train, np.memmap)
    assert not again.x_train.flags.writeable
    assert np.array_equal(again.x_train, dataset.x_train)


def test_the_checksum_is_of_the_content(tmp_path, dataset):
    assert small_dataset(tmp_path / "same").digest == dataset.digest
    assert small_dataset(tmp_path / "other", per_domain=39).digest != dataset.digest


def test_damage_is_named(tmp_path):
    small_dataset(tmp_path / "d")
    (tmp_path / "d" / "train_x.npy").write_bytes(b"junk")
    with pytest.raises(DataError, match="remove the folder"):
        Dataset(tmp_path / "d")


def test_labels_out_of_range_are_refused_by_domain(tmp_path):
    x, y = np.zeros((2, 3, 8, 8), np.uint8), np.array([0, 7])
    with pytest.raises(DataError, match=r"domain 'a', train: labels from 0 to 7, expected 0 to 3"):
        Dataset.from_arrays("n", tmp_path / "d", {"a": {"train": (x, y), "test": (x, y)}}, ("w", "x", "y", "z"))


def test_unknown_names_and_missing_roots():
    with pytest.raises(ConfigError, match="did you mean 'digits'"):
        load_dataset("digit")
    with pytest.raises(ConfigError, match=r"set federation\.root"):
        load_dataset("folder")
