"""Named tensors of any bits, for property tests."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st

from fedsim.types import Tensors

WIDTHS = {
    torch.float32: 4,
    torch.float64: 8,
    torch.float16: 2,
    torch.bfloat16: 2,
    torch.int64: 8,
    torch.int32: 4,
    torch.uint8: 1,
}


@st.composite
def any_bits(draw: st.DrawFn) -> torch.Tensor:
    """A tensor of any dtype, shape and bits: NaN payloads, -0.0 and denormals among them."""
    dtype = draw(st.sampled_from([*WIDTHS, torch.bool]))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    size = math.prod(shape)
    if dtype is torch.bool:
        return torch.tensor(draw(st.lists(st.booleans(), min_size=size, max_size=size)), dtype=torch.bool).reshape(
            shape
        )
    data = draw(st.binary(min_size=size * WIDTHS[dtype], max_size=size * WIDTHS[dtype]))
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)


def named_bits(most: int = 6) -> st.SearchStrategy[Tensors]:
    """Tensors under names as modules have them, in any order."""
    names = st.text(st.sampled_from("abcXYZ019._@/ é"), min_size=1, max_size=12)
    return st.dictionaries(names, any_bits(), max_size=most)


def identical(a: Tensors, b: Tensors) -> bool:
    """The same names in the same order (sums over tensors depend on it), dtypes, shapes and bits."""
    raw = lambda v: v.contiguous().reshape(-1).view(torch.uint8).tolist() if v.numel() else []  # noqa: E731
    return list(a) == list(b) and all(
        (a[n].dtype, a[n].shape, raw(a[n])) == (b[n].dtype, b[n].shape, raw(b[n])) for n in a
    )
