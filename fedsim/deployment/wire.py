"""Tensors packed for the way: Flower sends every array in two objects, each fetched by a signed call of its own, so a
model of a hundred tensors takes hundreds of calls. Packed it is one array, cut by Flower into pieces of a few MB.
"""

from __future__ import annotations

import json

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict
from safetensors.numpy import load

PACKED = "safetensors"


def pack(content: RecordDict) -> RecordDict:
    """The same content with one array a record: the bytes of each under what describes it, in the arrays' order (sums
    over tensors depend on it)."""
    out = RecordDict(dict(content))
    for name, record in content.array_records.items():
        if record:
            data = _join(
                {
                    f"{i:06d}|{a.dtype}|{'x'.join(map(str, a.shape))}|{a.stype}|{n}": a.data
                    for i, (n, a) in enumerate(record.items())
                }
            )
            out[name] = ArrayRecord({PACKED: Array("uint8", (len(data),), PACKED, data)})
    return out


def _join(parts: dict[str, bytes]) -> bytes:
    """A safetensors file of byte arrays; the library's own writer copies everything twice more."""
    header, end = {}, 0
    for name, data in parts.items():
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of eight
    return b"".join([len(text).to_bytes(8, "little"), text, *parts.values()])


def unpack(content: RecordDict) -> RecordDict:
    """The inverse of ``pack``.

    Raises:
        Exception: whatever a parser raises on what was not packed.
    """
    out = RecordDict(dict(content))
    for name, record in content.array_records.items():
        if record:
            parts = load(record[PACKED].data)
            out[name] = ArrayRecord(dict(_array(key, parts[key]) for key in sorted(parts)))
    return out


def _array(key: str, data: np.ndarray) -> tuple[str, Array]:
    _, dtype, shape, stype, name = key.split("|", 4)
    return name, Array(dtype, tuple(int(s) for s in shape.split("x") if s), stype, data.tobytes())
