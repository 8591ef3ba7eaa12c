"""Tensors packed for the way: Flower sends every array in two objects, each fetched by a signed call of its own, so a
model of a hundred tensors takes hundreds of calls. Packed it is one array, cut by Flower into pieces of a few MB.
"""

from __future__ import annotations

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict
from safetensors.numpy import load, save

PACKED = "safetensors"


def pack(content: RecordDict) -> RecordDict:
    """The same content with one array a record: the bytes of each under what describes it, in the arrays' order (sums
    over tensors depend on it)."""
    out = RecordDict(dict(content))
    for name, record in content.array_records.items():
        if record:
            parts = {
                f"{i:06d}|{a.dtype}|{'x'.join(map(str, a.shape))}|{a.stype}|{n}": np.frombuffer(a.data, np.uint8)
                for i, (n, a) in enumerate(record.items())
            }
            out[name] = ArrayRecord({PACKED: Array(np.frombuffer(save(parts), np.uint8))})
    return out


def unpack(content: RecordDict) -> RecordDict:
    """The inverse of ``pack``.

    Raises:
        Exception: whatever a parser raises on what was not packed.
    """
    out = RecordDict(dict(content))
    for name, record in content.array_records.items():
        if record:
            parts = load(record[PACKED].numpy().tobytes())
            out[name] = ArrayRecord(dict(_array(key, parts[key]) for key in sorted(parts)))
    return out


def _array(key: str, data: np.ndarray) -> tuple[str, Array]:
    _, dtype, shape, stype, name = key.split("|", 4)
    return name, Array(dtype, tuple(int(s) for s in shape.split("x") if s), stype, data.tobytes())
