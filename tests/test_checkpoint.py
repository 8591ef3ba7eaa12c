"""Checkpoints: identity, keeping, and damage that is named."""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

from fedsim.checkpoint import Checkpoints, Snapshot, state_sha256
from fedsim.errors import DataError
from tests.tensors import identical, named_bits

STATE = {"w": torch.tensor([1.5, -0.0, float("nan")]), "n": torch.tensor(3), "empty": torch.zeros(0)}


def test_load_is_the_identity_bits_included(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(Snapshot(4, STATE, {"totals": {"seconds": 1.5}}))
    found = checkpoints.newest()
    assert (found.round, found.record) == (4, {"totals": {"seconds": 1.5}})
    assert state_sha256(found.state) == state_sha256(STATE)


@settings(max_examples=60, deadline=None)
@given(named_bits())
def test_saved_and_loaded_is_the_identity_for_any_bits(state):
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder))
        checkpoints.save(Snapshot(1, state, {}))
        found = checkpoints.newest().state
    assert identical(found, state)


def test_keeps_the_newest(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for round in range(1, 5):
        checkpoints.save(Snapshot(round, STATE, {}))
    assert checkpoints.rounds() == [3, 4]
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("damage", ["flip", "truncate", "header", "missing"])
def test_damage_is_named_and_the_one_before_offered(tmp_path, damage):
    checkpoints = Checkpoints(tmp_path)
    for round in (1, 2):
        checkpoints.save(Snapshot(round, STATE, {}))
    tensors, header = tmp_path / "round-000002.safetensors", tmp_path / "round-000002.json"
    data = bytearray(tensors.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        tensors.write_bytes(data)
    elif damage == "truncate":
        tensors.write_bytes(data[:-3])
    elif damage == "header":
        header.write_text("{")
    else:
        tensors.unlink()
    with pytest.raises(DataError, match=r"round-000002.*resume --round 1"):
        checkpoints.newest()


def test_the_checksum_sees_names_dtypes_and_shapes():
    base = state_sha256({"a": torch.zeros(4)})
    others = [{"b": torch.zeros(4)}, {"a": torch.zeros(2, 2)}, {"a": torch.zeros(4, dtype=torch.int32)}]
    assert base not in {state_sha256(o) for o in others}
