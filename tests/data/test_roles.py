"""Plays by role: both formats, windows, split, and what is refused."""

import gzip
import json

import numpy as np
import pytest

from fedsim.data import load_dataset, partition
from fedsim.data.roles import LENGTH, load_roles, read_roles
from fedsim.errors import ConfigError, DataError

LONG = {"HAM": "To be, or not to be. " * 60, "OPH": "Good my lord! " * 90}
SHORT = {"GHOST": "Adieu, adieu. "}


@pytest.fixture
def jsonl(tmp_path):
    lines = [json.dumps({"play": "hamlet", "role": r, "text": t}) for r, t in {**LONG, **SHORT}.items()]
    path = tmp_path / "roles.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


def test_windows_are_the_text_and_the_labels_one_character_on(jsonl):
    arrays, characters, groups = load_roles(jsonl)
    x, y = arrays["plays"]["train"]
    assert x.shape == y.shape == (sum(groups["plays"]), LENGTH)
    assert np.array_equal(x[:, 1:], y[:, :-1])
    decode = lambda codes: "".join(characters[c] for c in codes)  # noqa: E731
    first = LONG["HAM"][: len(LONG["HAM"]) * 4 // 5]
    count = groups["plays"][0]
    assert count == (len(first) - 1) // LENGTH
    assert decode(x[:count].reshape(-1)) == first[: count * LENGTH]
    tx, _ = arrays["plays"]["test"]
    assert decode(tx[0]) == LONG["HAM"][len(first) : len(first) + LENGTH], "the last fifth is for testing"
    assert len(groups["plays"]) == 2, "short roles are left out"


def test_plain_text_with_names(tmp_path):
    path = tmp_path / "play.txt"
    path.write_text("HAM:\nTo be,\nor not\n\nOPH:\nGood my lord!\n\nHAM:\nto be.\n")
    assert read_roles(path) == {"HAM": "To be,\nor not\nto be.", "OPH": "Good my lord!"}


def test_every_role_is_a_client(jsonl):
    dataset = load_dataset("roles", jsonl, progress=False)
    shards = partition(dataset, ["plays"], "natural")
    assert shards.sizes.tolist() == dataset.groups["plays"]
    assert np.array_equal(np.sort(shards.indices), dataset.slice("plays", "train"))
    larger = partition(dataset, ["plays"], "natural", min_examples=int(shards.sizes.max()))
    assert len(larger) < len(shards) or len(set(shards.sizes)) == 1
    with pytest.raises(ConfigError, match="no client of roles holds so many"):
        partition(dataset, ["plays"], "natural", min_examples=10_000)


def test_natural_needs_a_data_set_that_knows(dataset):
    with pytest.raises(ConfigError, match="does not know whose"):
        partition(dataset, ["photo"], "natural")


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.jsonl", b'{"play": "x", "role": "y"}\n', "line 1"),
        ("b.jsonl", b"To be\n", "line 1"),
        ("c.jsonl.gz", b"not gzip", "cannot be read"),
        ("d.txt", b"\xff\xfe\xff", "cannot be read"),
        ("e.txt", b"HAM:\nTo be\n", "no role of at least"),
    ],
)
def test_bad_files_are_named(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=words) as error:
        load_roles(tmp_path / name)
    assert name in str(error.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        load_dataset("roles", tmp_path / "nothing.txt", progress=False)
