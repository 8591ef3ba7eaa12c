"""Thousands of small trees of tensors, all alike: as columns in a message, as safetensors in the row of a file.

A small network's normalization is twenty tensors of a few numbers. For a thousand clients, whatever is done to each of
these costs more than training them: so it is done to the column of all clients, or once for all trees of a structure.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import load, save

from fedsim.types import ClientState, Tensors

Structure = tuple[tuple[str, torch.dtype, torch.Size], ...]
Columns = tuple[list[int], Tensors, Tensors]  # numbers of k states, their private [k, ...] and memory [k, ...]


def structure(tensors: Tensors) -> Structure:
    """Names in their order, dtypes and shapes."""
    return tuple((name, value.dtype, value.shape) for name, value in tensors.items())


class States(Sequence[ClientState]):
    """Client states that are pickled as columns: one array for each name, not for each client and name. A state that
    occurs several times, as the initial one does, is sent once."""

    def __init__(self, states: Sequence[ClientState]):
        self.states = states

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, index: Any) -> Any:
        return self.states[index]

    def __reduce__(self) -> Any:
        distinct = {id(state): state for state in self.states}
        numbers = {key: number for number, key in enumerate(distinct)}
        alike: dict[tuple[Structure, Structure], list[int]] = {}
        unique = list(distinct.values())
        for number, state in enumerate(unique):
            alike.setdefault((structure(state.private), structure(state.memory)), []).append(number)
        columns = [
            (group, _stack([unique[i].private for i in group]), _stack([unique[i].memory for i in group]))
            for group in alike.values()
        ]
        return _states, ([numbers[id(state)] for state in self.states], columns)


def _states(order: list[int], columns: list[Columns]) -> States:
    found: dict[int, ClientState] = {}
    for group, private, memory in columns:
        states = map(ClientState, rows(private, len(group)), rows(memory, len(group)))
        found |= zip(group, states)
    return States([found[number] for number in order])


def _stack(trees: list[Tensors]) -> Tensors:
    if len(trees) == 1:
        return {name: value.unsqueeze(0) for name, value in trees[0].items()}
    return {name: torch.stack([tree[name] for tree in trees]) for name in trees[0]}


def rows(columns: Tensors, count: int) -> list[Tensors]:
    """[count, ...] of each name -> a tree of views for each row."""
    cut = [value.unbind(0) for value in columns.values()]
    return [dict(zip(columns, values)) for values in zip(*cut)] if cut else [{} for _ in range(count)]


def to_bytes(tensors: Tensors) -> bytes:
    """What ``safetensors.torch.save`` gives, with the header made once for all trees of a structure."""
    head, names = _layout(structure(tensors))
    return head + b"".join([_raw(tensors[name]) for name in names])


def _raw(value: torch.Tensor) -> bytes:
    return (value.view(torch.int16) if value.dtype is torch.bfloat16 else value).detach().numpy().tobytes()


@functools.lru_cache(maxsize=256)
def _layout(of: Structure) -> tuple[bytes, list[str]]:
    """(header, names in the order in which the bytes of the tensors follow it)"""
    head = _head(save({name: torch.zeros(shape, dtype=dtype) for name, dtype, shape in of}))
    entries = json.loads(head[8:])
    return head, sorted(entries, key=lambda name: entries[name]["data_offsets"])


def _head(data: bytes) -> bytes:
    return data[: 8 + int.from_bytes(data[:8], "little")]


_known: dict[bytes, list[tuple[str, torch.dtype, torch.Size, int]]] = {}  # by header: name, dtype, shape, first byte


def from_bytes(data: bytes) -> Tensors:
    """What ``safetensors.torch.load`` gives, which reads and checks the first tree of a structure; ``data`` must be as
    ``to_bytes`` made it."""
    head = _head(data)
    if head not in _known:
        entries = json.loads(head[8:])
        _known[head] = [(n, v.dtype, v.shape, entries[n]["data_offsets"][0]) for n, v in load(data).items()]
    buffer = bytearray(data[len(head) :])
    out = {}
    for name, dtype, shape, start in _known[head]:
        count = shape.numel()
        flat = (
            torch.frombuffer(buffer, dtype=dtype, count=count, offset=start) if count else torch.empty(0, dtype=dtype)
        )
        out[name] = flat if len(shape) == 1 else flat.view(shape)
    return out
