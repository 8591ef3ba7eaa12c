"""Sparse arrays: nothing is lost, they are as short as promised, and what is not ours is refused."""

import math

import numpy as np
import pytest
import torch
from flwr.app import Array
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedsim.wire import decode, encode, to_arrays, to_tensors, to_tensors_and_masks

SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=40)


def bits(t: torch.Tensor) -> bytes:
    return t.contiguous().numpy().tobytes()


@given(
    st.sampled_from([np.float32, np.float64, np.int64, np.uint8, np.bool_]).flatmap(
        lambda dtype: hnp.arrays(dtype, SHAPES)
    ),
    st.floats(0, 1),
)
def test_a_tensor_survives_to_the_bit(values, share):
    """-0.0, NaN payloads and infinities included; without a mask nothing is known of what is zero."""
    values[np.random.default_rng(0).random(values.shape) < share] = 0
    tensor = torch.from_numpy(values)
    again, mask = decode(encode(tensor))
    assert mask is None
    assert (again.dtype, again.shape, bits(again)) == (tensor.dtype, tensor.shape, bits(tensor))


@given(hnp.arrays(np.float32, SHAPES), st.floats(0, 1), st.integers(0, 9))
def test_a_mask_travels_with_its_tensor(values, share, seed):
    mask = torch.from_numpy(np.asarray(np.random.default_rng(seed).random(values.shape) < share))
    tensor = torch.where(mask, torch.from_numpy(values), 0)
    again, kept = decode(encode(tensor, mask))
    assert bits(again) == bits(tensor)
    assert torch.equal(kept, mask)


@pytest.mark.parametrize("density", [0.001, 0.01, 0.05, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(16, 16), (64, 64, 3, 3), (512, 512)])
def test_length_is_the_shorter_of_bitmap_and_indices(shape, density):
    count = math.prod(shape)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < density
    kept = int(mask.sum())
    array = encode(torch.where(mask, torch.ones(shape), 0), mask)
    assert len(array.data) <= min(math.ceil(count / 8), 4 * kept) + 4 * kept


def test_a_dense_tensor_stays_an_array_that_any_flower_app_reads():
    array = encode(torch.arange(6.0).view(2, 3) + 1)
    assert array.stype == "numpy.ndarray"
    assert np.array_equal(array.numpy(), np.arange(6.0, dtype=np.float32).reshape(2, 3) + 1)


def test_a_value_outside_the_mask_is_not_dropped_in_silence():
    with pytest.raises(ValueError, match="outside the mask"):
        encode(torch.tensor([0.0, -0.0]), torch.tensor([True, False]))


LIKE = torch.zeros(64)
GOOD = encode(torch.eye(8).view(64), torch.eye(8, dtype=torch.bool).view(64))
BAD = {
    "truncated": Array("float32", (64,), GOOD.stype, GOOD.data[:-1]),
    "longer": Array("float32", (64,), GOOD.stype, GOOD.data + b"\0"),
    "another shape": Array("float32", (65,), GOOD.stype, GOOD.data),
    "a huge shape": Array("float32", (2**40,), GOOD.stype, GOOD.data),
    "a negative shape": Array("float32", (-64,), GOOD.stype, GOOD.data),
    "unknown form": Array("float32", (64,), "fedsim.mask.runs", GOOD.data),
    "unknown kind": Array("float32", (64,), "fedsim.what.index", GOOD.data),
    "index out of range": Array("float32", (64,), "fedsim.mask.index", b"\x40" + b"\0" * 4),
    "indices not ascending": Array("float32", (64,), "fedsim.mask.index", b"\x02\x02" + b"\0" * 8),
    "objects": Array("object", (64,), GOOD.stype, GOOD.data),
    "no dtype": Array("flaot", (64,), GOOD.stype, GOOD.data),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_encode_does_not_write_is_refused(kind):
    with pytest.raises((ValueError, TypeError)):
        decode(BAD[kind], LIKE)


def test_a_sparse_array_nobody_expects_is_not_unfolded():
    record = to_arrays({"a": torch.zeros(1000)})
    with pytest.raises(ValueError, match="not expected"):
        to_tensors(record, {})
    assert to_tensors(record, {"a": torch.zeros(1000)})["a"].shape == (1000,)


def test_records_keep_names_and_masks():
    mask = torch.tensor([True, False, True])
    tensors = {"w": torch.tensor([0.0, 0.0, 2.0]), "b": torch.tensor(3.0)}
    again, masks = to_tensors_and_masks(to_arrays(tensors, {"w": mask}))
    assert {n: v.tolist() for n, v in again.items()} == {"w": [0.0, 0.0, 2.0], "b": 3.0}
    assert list(masks) == ["w"]
    assert torch.equal(masks["w"], mask)
