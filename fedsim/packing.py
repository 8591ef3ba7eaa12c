"""What clients keep, as rows of bytes: thousands of small trees of tensors that are all alike.

A small network's normalization is twenty tensors of a few numbers. For a thousand clients, whatever is done to each of
these costs more than training them. So a state is one row of bytes wherever nobody looks into it, in a message, in
memory and in the file, and tensors are copied by the column of all clients. With the ``head`` of its layout before it
a row is a safetensors file.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save

from fedsim.types import ClientState, Tensors

CPU = torch.device("cpu")
PRIVATE, MEMORY = "p/", "m/"
Structure = tuple[tuple[str, torch.dtype, torch.Size], ...]  # names in their order, dtypes and shapes


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes are in a row."""

    name: str
    dtype: torch.dtype
    shape: torch.Size
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Layout:
    """How a state's tensors lie in a row of ``size`` bytes. Those with one ``head`` are one object, as long as it is
    among the last that were asked for."""

    head: bytes
    size: int
    private: tuple[Place, ...]
    memory: tuple[Place, ...]

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def of(private: Structure, memory: Structure) -> Layout:
        """Of states with such tensors."""
        tensors: Tensors = {}
        for prefix, tree in ((PRIVATE, private), (MEMORY, memory)):
            # Numbered, since the file keeps no order and sums over tensors depend on it.
            tensors |= {f"{prefix}{i:06d}/{n}": torch.zeros(s, dtype=dtype) for i, (n, dtype, s) in enumerate(tree)}
        return Layout.read(head_of(save(tensors)))

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def read(head: bytes) -> Layout:
        """From the header of a file that ``Packed.to_bytes`` made."""
        entries = json.loads(head[8:])
        dtypes = _dtypes(entries)

        def places(prefix: str) -> tuple[Place, ...]:
            found = [(name, entries[name]) for name in sorted(entries) if name.startswith(prefix)]
            short = len(prefix) + 7
            return tuple(Place(n[short:], dtypes[n], torch.Size(e["shape"]), *e["data_offsets"]) for n, e in found)

        private, memory = places(PRIVATE), places(MEMORY)
        return Layout(head, max((place.stop for place in (*private, *memory)), default=0), private, memory)

    @property
    def empty(self) -> bool:
        """Whether it is of a client that keeps nothing."""
        return not self.private and not self.memory

    def __reduce__(self) -> Any:
        return Layout.read, (self.head,)


@dataclass(frozen=True, eq=False)
class Packed:
    """A client's state: ``row`` is uint8 [layout.size]. Of several clients at once ``columns`` makes tensors."""

    layout: Layout
    row: np.ndarray

    @classmethod
    def of(cls, state: ClientState) -> Packed:
        single = lambda tree: {n: v.unsqueeze(0) for n, v in tree.items()}  # noqa: E731
        return pack(single(state.private), single(state.memory), 1)[0]

    @staticmethod
    @functools.cache
    def nothing() -> Packed:
        return Packed.of(ClientState())

    def unpack(self, device: torch.device = CPU) -> ClientState:
        """The state in tensors of its own."""
        private, memory = ({n: v[0] for n, v in tree.items()} for tree in columns([self], device))
        return ClientState(private, memory)

    def without_memory(self) -> Packed:
        """The same without what plug-ins remember."""
        return Packed.of(ClientState(self.unpack().private)) if self.layout.memory else self

    def copy(self) -> Packed:
        return Packed(self.layout, self.row.copy())

    def to_bytes(self) -> bytes:
        """A safetensors file."""
        return self.layout.head + self.row.tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> Packed:
        """``data`` must be as ``to_bytes`` made it; it stays in memory as long as this."""
        layout = Layout.read(head_of(data))
        return cls(layout, np.frombuffer(data, np.uint8, layout.size, len(layout.head)))


def head_of(data: bytes) -> bytes:
    """A safetensors file's header with the eight bytes of its length."""
    return data[: 8 + int.from_bytes(data[:8], "little")]


def _dtypes(entries: dict[str, dict]) -> dict[str, torch.dtype]:
    """Of a header's tensors, by their names: as the library reads them from a file in which they are empty."""
    header = json.dumps({n: {**entry, "shape": [0], "data_offsets": [0, 0]} for n, entry in entries.items()}).encode()
    return {name: value.dtype for name, value in load(len(header).to_bytes(8, "little") + header).items()}


def _structure(columns: Tensors) -> Structure:
    return tuple((name, value.dtype, value.shape[1:]) for name, value in columns.items())


def pack(private: Tensors, memory: Tensors, count: int) -> list[Packed]:
    """States whose tensors are [count, ...], as rows of one array."""
    layout = Layout.of(_structure(private), _structure(memory))
    out = np.empty((count, layout.size), np.uint8)
    for place, column in zip((*layout.private, *layout.memory), (*private.values(), *memory.values())):
        if column.numel():
            column = column.view(torch.int16) if column.dtype is torch.bfloat16 else column  # numpy has no such type
            flat = np.ascontiguousarray(column.detach().cpu().numpy()).reshape(count, -1)
            out[:, place.start : place.stop] = flat.view(np.uint8)
    return [Packed(layout, row) for row in out]


def columns(packed: Sequence[Packed], device: torch.device = CPU) -> tuple[Tensors, Tensors]:
    """(private, memory) of states of one layout: tensors [k, ...] of their own."""
    layout = packed[0].layout
    rows = torch.from_numpy(np.stack([p.row for p in packed])).to(device)
    private, memory = ({p.name: _column(rows, p) for p in places} for places in (layout.private, layout.memory))
    return private, memory


def _column(rows: torch.Tensor, place: Place) -> torch.Tensor:
    shape = (len(rows), *place.shape)
    if not place.shape.numel():
        return torch.empty(shape, dtype=place.dtype, device=rows.device)
    return rows[:, place.start : place.stop].reshape(-1).view(place.dtype).view(shape)


class States(Sequence[Packed]):
    """Client states that are pickled as one array for each layout. A state that occurs several times, as the initial
    one does, is sent once."""

    def __init__(self, states: Sequence[Packed]):
        self.states = states

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, index: Any) -> Any:
        return self.states[index]

    def __reduce__(self) -> Any:
        distinct = {id(state): state for state in self.states}
        order = {key: number for number, key in enumerate(distinct)}
        unique = list(distinct.values())
        alike: dict[Layout, list[int]] = {}
        for number, state in enumerate(unique):
            alike.setdefault(state.layout, []).append(number)
        groups = [(layout, numbers, _block([unique[n].row for n in numbers])) for layout, numbers in alike.items()]
        return _states, ([order[id(state)] for state in self.states], groups)


def _block(rows: list[np.ndarray]) -> np.ndarray:
    return rows[0][None] if len(rows) == 1 else np.stack(rows)  # one may be as large as a model


def _states(order: list[int], groups: list[tuple[Layout, list[int], np.ndarray]]) -> States:
    found: dict[int, Packed] = {}
    for layout, numbers, rows in groups:
        found |= zip(numbers, (Packed(layout, row) for row in rows))
    return States([found[number] for number in order])
