"""Guarantees of the digits suite."""

import numpy as np
import pytest

from fedsim.data.digits import DOMAINS, build_digits
from fedsim.data.digits.sources import REGIONS, fonts, pictures
from fedsim.data.digits.suite import TEST, TRAIN, _pool
from fedsim.errors import DataError


def test_shapes_types_and_labels(digits):
    assert tuple(digits) == DOMAINS
    for splits in digits.values():
        for split, count in (("train", 12), ("test", 15)):
            x, y = splits[split]
            assert (x.shape, x.dtype) == ((count, 3, 28, 28), np.uint8)
            assert (y.shape, y.dtype) == ((count,), np.int64)
            assert set(y) <= set(range(10))


def test_the_same_bytes_with_two_processes(digits):
    again = build_digits(0, train=12, test=15, workers=2)
    for domain in DOMAINS:
        for split in ("train", "test"):
            assert all(map(np.array_equal, digits[domain][split], again[domain][split])), (domain, split)


def test_image_i_depends_on_nothing_but_its_number(digits):
    fewer = build_digits(0, train=7, test=5, workers=1, domains=("street", "mnistm", "utility", "mnist"))
    for domain, splits in fewer.items():
        for split, (x, y) in splits.items():
            assert np.array_equal(x, digits[domain][split][0][: len(x)]), (domain, split)
            assert np.array_equal(y, digits[domain][split][1][: len(y)])


def test_another_seed_draws_other_images(digits):
    other = build_digits(1, train=5, test=5, workers=1)
    for domain in set(DOMAINS) - {"optdigits"}:  # its rows are cut in the order of writing, whatever the seed
        assert not np.array_equal(other[domain]["train"][0], digits[domain]["train"][0][:5]), domain


def test_real_digits_are_never_shared():
    def rows(domain, split):
        x, _ = _pool(domain, split, 0)
        return {image.tobytes() for image in x}

    mnist = [rows(d, s) for d in ("mnist", "mnistm") for s in ("train", "test")]
    assert sum(map(len, mnist)) == len(set().union(*mnist)) == 5000
    for domain, total in (("utility", 1994), ("optdigits", 1797)):
        x, y = zip(*(_pool(domain, split, 0) for split in ("train", "test")))
        assert [len(p) for p in x] == [TRAIN, total - TRAIN]
        if domain == "utility":
            assert not rows(domain, "train") & rows(domain, "test")
            assert np.ptp(np.bincount(y[0])) <= 1, "the training digits are spread evenly over the classes"
    assert len(_pool("mnist", "test", 0)[0]) >= TEST


def test_photographs_are_cut_apart():
    assert REGIONS["train"][1] < REGIONS["test"][0]
    assert len(pictures("photo")) == 7
    assert len(pictures("texture")) == 3
    assert len(fonts().names) == 83
    assert 60 < len(fonts().on_houses) < 83


def test_no_image_is_there_twice(digits):
    seen = [image.tobytes() for splits in digits.values() for x, _ in splits.values() for image in x]
    assert len(seen) == len(set(seen))


def test_too_many_real_digits_are_refused():
    with pytest.raises(DataError, match=r"'mnist': 900 training images asked for, 850 exist"):
        build_digits(0, train=900, test=1, domains=("mnist",), workers=1)
