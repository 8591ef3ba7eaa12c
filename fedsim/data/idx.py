"""MNIST's own file format: a folder with {train,t10k}-images-idx3-ubyte and -labels-idx1-ubyte, plain or .gz."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from fedsim.data.dataset import Arrays
from fedsim.data.images import need_folder
from fedsim.errors import DataError

PREFIX = {"train": "train", "test": "t10k"}


def read_idx(path: Path) -> np.ndarray:
    """An array of unsigned bytes.

    Raises:
        DataError: not that format, or cut short.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise DataError(f"{path}: no IDX file of unsigned bytes (it begins with {data[:4].hex(' ') or 'nothing'})")
    dimensions, header = data[3], 4 + 4 * data[3]
    if len(data) < header:
        raise DataError(f"{path}: ends inside its header")
    shape = struct.unpack(f">{dimensions}I", data[4:header])
    if len(data) - header != math.prod(shape):
        raise DataError(
            f"{path}: holds {len(data) - header} values, its header promises {math.prod(shape)}; take a whole copy"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def load_idx(root: Path) -> tuple[Arrays, tuple[str, ...]]:
    """One domain, named after the folder; images uint8 [N, 1, H, W]."""
    need_folder(root, "train-images-idx3-ubyte and its three companions, .gz or not")
    splits = {}
    for split, prefix in PREFIX.items():
        parts = []
        for kind, axes in (("images-idx3-ubyte", 3), ("labels-idx1-ubyte", 1)):
            found = [p for p in (root / f"{prefix}-{kind}", root / f"{prefix}-{kind}.gz") if p.exists()]
            if not found:
                raise DataError(f"{root}: {prefix}-{kind} is missing (with or without .gz)")
            parts.append(read_idx(found[0]))
            if parts[-1].ndim != axes or not len(parts[-1]):
                raise DataError(f"{found[0]}: an array of shape {parts[-1].shape}, expected {axes} axes, not empty")
        splits[split] = (parts[0][:, None], parts[1].astype(np.int64))
    classes = max(int(y.max()) for _, y in splits.values()) + 1
    return {root.resolve().name: splits}, tuple(str(c) for c in range(classes))
