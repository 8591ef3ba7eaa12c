"""Tensors as Flower arrays: dense, or sparse without loss where that is shorter.

A tensor whose mask is known, or most of whose elements are zero, is sent as positions and values: a bitmap of
ceil(n / 8) bytes or a list of indices of 1, 2 or 4 bytes each, whichever is shorter, then the values. Elements count as
zero by their bits, so -0.0 and NaN payloads survive. The four forms are told apart by the array's ``stype``, so a
message needs nothing beside itself to be read:

    fedsim.zero.bitmap, fedsim.zero.index     the positions are those of the elements that are not zero
    fedsim.mask.bitmap, fedsim.mask.index     the positions are the mask, which the reader gets back
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord

from fedsim.types import Tensors

MOST = 2**31  # elements of one tensor that a reader is willing to unfold
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def nonzero(tensor: torch.Tensor) -> torch.Tensor:
    """Elements whose bits are not all zero, bool of the tensor's shape."""
    return tensor.contiguous().view(BITS[tensor.element_size()]) != 0


def index_type(count: int) -> type[np.unsignedinteger]:
    """The smallest unsigned integer that numbers ``count`` positions."""
    return np.uint8 if count <= 2**8 else np.uint16 if count <= 2**16 else np.uint32


def encode(tensor: torch.Tensor, mask: torch.Tensor | None = None) -> Array:
    """One tensor as a Flower array.

    Args:
        mask: bool of the tensor's shape; elements outside it are zero. It travels with the values.

    Raises:
        ValueError: an element outside the mask is not zero: it would be lost.
    """
    tensor = tensor.detach().cpu().contiguous()
    values = tensor.numpy()
    keep = nonzero(tensor) if mask is None else mask.cpu()
    if mask is not None and bool((nonzero(tensor) & ~keep).any()):
        raise ValueError("an element outside the mask is not zero")
    flat = keep.numpy().reshape(-1)
    count, width = int(np.count_nonzero(flat)), index_type(flat.size)().itemsize
    positions = min(math.ceil(flat.size / 8), count * width)
    if mask is None and positions + count * values.itemsize >= values.nbytes:
        return Array(values)
    if count * width < math.ceil(flat.size / 8):
        form, where = "index", np.flatnonzero(flat).astype(index_type(flat.size)).tobytes()
    else:
        form, where = "bitmap", np.packbits(flat).tobytes()
    stype = f"fedsim.{'zero' if mask is None else 'mask'}.{form}"
    return Array(str(values.dtype), tuple(values.shape), stype, where + values.reshape(-1)[flat].tobytes())


def decode(array: Array, like: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(the tensor, its mask if one travelled with it).

    Args:
        like: what is expected; a sparse array of another shape is refused before it is unfolded.

    Raises:
        ValueError: the array is not one that ``encode`` writes.
    """
    if not array.stype.startswith("fedsim."):
        return torch.from_numpy(np.require(array.numpy(), requirements="W")), None
    kind, _, form = array.stype.removeprefix("fedsim.").partition(".")
    shape, size = tuple(array.shape), math.prod(array.shape)
    if kind not in ("zero", "mask") or form not in ("bitmap", "index"):
        raise ValueError(f"array of unknown kind '{array.stype}'")
    if size > MOST or min(shape, default=1) < 0 or (like is not None and shape != tuple(like.shape)):
        expected = f"shape {tuple(like.shape)}" if like is not None else f"at most {MOST} elements"
        raise ValueError(f"array has shape {shape}, expected {expected}")
    dtype = np.dtype(array.dtype)
    if dtype.hasobject:
        raise ValueError("array of objects")
    keep, values = _positions(form, array.data, size, dtype)
    out = np.zeros(size, dtype)
    out[keep] = values
    tensor = torch.from_numpy(out.reshape(shape))
    if kind == "zero":
        return tensor, None
    mask = np.zeros(size, bool)
    mask[keep] = True
    return tensor, torch.from_numpy(mask.reshape(shape))


def unfolded_bytes(record: ArrayRecord) -> int:
    """Memory that the tensors of a record will take: a few bytes of a sparse array may stand for gigabytes.

    Raises:
        TypeError, ValueError: an array of no known type.
    """
    total = 0
    for array in record.values():
        sparse = array.stype.startswith("fedsim.")
        size = math.prod(max(n, 0) for n in array.shape)
        total += size * (np.dtype(array.dtype).itemsize + 1) if sparse else len(array.data)
    return total


def _positions(form: str, data: bytes, size: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """(positions in the flat tensor, values at them)."""
    if form == "bitmap":
        length = math.ceil(size / 8)
        keep = np.flatnonzero(np.unpackbits(np.frombuffer(data[:length], np.uint8), count=size))
    else:
        width = index_type(size)
        count, rest = divmod(len(data), width().itemsize + dtype.itemsize)
        length = count * width().itemsize
        keep = np.frombuffer(data[:length], width).astype(np.int64)
        if rest or (keep >= size).any() or (np.diff(keep) <= 0).any():
            raise ValueError("sparse array: its indices are not ascending positions of the tensor")
    if len(data) - length != len(keep) * dtype.itemsize:
        raise ValueError(f"sparse array: {len(data)} bytes, expected {length + len(keep) * dtype.itemsize}")
    return keep, np.frombuffer(data[length:], dtype)


def to_arrays(tensors: Tensors, masks: Mapping[str, torch.Tensor] | None = None) -> ArrayRecord:
    """Named tensors as a record, each dense or sparse; ``masks`` of some of them travel along."""
    masks = masks or {}
    return ArrayRecord({n: encode(v, masks.get(n)) for n, v in tensors.items()})


def to_dense_arrays(tensors: Tensors) -> ArrayRecord:
    """Named tensors as numpy arrays, which any Flower app can read."""
    return ArrayRecord({n: Array(v.detach().cpu().contiguous().numpy()) for n, v in tensors.items()})


def to_tensors_and_masks(record: ArrayRecord, like: Tensors | None = None) -> tuple[Tensors, Tensors]:
    """What ``to_arrays`` was given; ``like``: the tensors that may come sparse, and the shapes to insist on.

    Raises:
        ValueError: not what ``to_arrays`` writes, or a sparse array that is not in ``like``.
    """
    for name, array in record.items():
        if like is not None and name not in like and array.stype.startswith("fedsim."):
            raise ValueError(f"'{name}' is sparse and not expected")
    read = {n: decode(a, like[n] if like is not None and n in like else None) for n, a in record.items()}
    return {n: t for n, (t, _) in read.items()}, {n: m for n, (_, m) in read.items() if m is not None}


def to_tensors(record: ArrayRecord, like: Tensors | None = None) -> Tensors:
    return to_tensors_and_masks(record, like)[0]
