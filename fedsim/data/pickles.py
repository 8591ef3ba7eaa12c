"""Pickles of arrays, read without trusting them.

A pickle can call any function it names. This unpickler knows what numpy arrays of numbers and strings are made of and
refuses every other name.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.errors import DataError


def _latin1(text: str, encoding: str) -> bytes:
    """How protocol 2 spells bytes: _codecs.encode(text, "latin1")."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the codec {encoding!r}, which is no part of an array")
    return text.encode("latin1")


class ArraysOnly(pickle.Unpickler):
    """Admits what numpy arrays of numbers and strings are made of."""

    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy._core.multiarray", "scalar"),
        ("numpy.core.numeric", "_frombuffer"),
        ("numpy._core.numeric", "_frombuffer"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        if (module, name) in self.ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of an array")


def read_pair(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The pair of arrays in one of FedBN's pickles.

    Raises:
        DataError: missing, damaged, or holding anything but two arrays of equal length.
    """
    try:
        value = ArraysOnly(io.BytesIO(path.read_bytes())).load()
    except FileNotFoundError:
        raise DataError(f"{path}: does not exist; expected as in FedBN's released package") from None
    except Exception as error:  # a damaged pickle raises whatever its last opcode happens to raise
        raise DataError(f"{path}: refused: {error}; expected a pickled pair of numpy arrays") from None
    if not (isinstance(value, tuple) and len(value) == 2 and all(isinstance(a, np.ndarray) and a.ndim for a in value)):
        raise DataError(f"{path}: holds {type(value).__name__}, expected a pair of numpy arrays")
    if len(value[0]) != len(value[1]):
        raise DataError(f"{path}: {len(value[0])} examples but {len(value[1])} labels")
    return value
