"""A function of tensors, replayed as the torch operators it comes to.

``vmap`` and ``grad`` find the operators of a step anew at every call: Python and torch's dispatcher, which take longer
than the operators themselves where these are small. They are the same at every call with tensors of the same shapes,
so they are written down once and then called one after the other: the same operators, and the same bits.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary


class _Recorder(TorchDispatchMode):
    """Writes every operator that runs into a program over the inputs ``t0, t1, ...``

    Attributes:
        foreign: an operator read a tensor that is neither an input nor made of inputs: its values may be others at the
            next call, so the program cannot stand for the function.
    """

    def __init__(self, inputs: Sequence[Tensor]):
        super().__init__()
        self.inputs, self.foreign = [f"t{number}" for number in range(len(inputs))], False
        self.lines: list[tuple[str, list[str], str]] = []  # (what it sets, what it reads, source)
        self.constants: dict[str, Any] = {}  # by reference: operators, shapes, dtypes, generators
        self.names: Any = WeakTensorKeyDictionary()  # weak: no tensor is in memory for longer than without a record
        for name, tensor in zip(self.inputs, inputs):
            self.names[tensor] = name

    def _source(self, value: Any, read: list[str]) -> str:
        """``read`` gets the names of the tensors in it."""
        if isinstance(value, Tensor):
            name = self.names.get(value)
            self.foreign |= name is None
            read.append(name or "None")
            return read[-1]
        if isinstance(value, list | tuple) and any(isinstance(part, Tensor) for part in value):
            return f"[{', '.join(self._source(part, read) for part in value)}]"
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    def _set(self, read: list[str], source: str) -> str:
        name = f"t{len(self.inputs) + len(self.lines)}"
        self.lines.append((name, read, f"{name} = {source}"))
        return name

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, read = kwargs or {}, list[str]()
        source = [self._source(value, read) for value in args]
        source += [f"{name}={self._source(value, read)}" for name, value in kwargs.items()]
        result = function(*args, **kwargs)
        name = self._set(read, f"{self._source(function, read)}({', '.join(source)})")
        if isinstance(result, Tensor):
            self.names[result] = name
        else:
            for number, part in enumerate(result if isinstance(result, Sequence) else ()):
                if isinstance(part, Tensor):
                    self.names[part] = self._set([name], f"{name}[{number}]")
        return result

    def program(self, outputs: Sequence[Any]) -> Callable:
        """inputs -> outputs; what is not read any more is freed."""
        kept: list[str] = []
        body = [f"return [{', '.join([self._source(output, kept) for output in outputs])}]"]
        later = {*kept}  # what the lines after the one at hand read
        for name, read, line in reversed(self.lines):
            done = {name, *read} - later
            later |= done
            body.append(f"{line}; del {', '.join(sorted(done))}" if done else line)
        source = "\n    ".join([f"def program({', '.join(self.inputs)}):", *reversed(body)])
        found: dict[str, Any] = {}
        exec(source, self.constants, found)
        return found["program"]


# Torch hides such modes from its compiler by a wrapper that loads all of it.
_Recorder.__torch_dispatch__ = inspect.unwrap(_Recorder.__torch_dispatch__)  # type: ignore[method-assign]


class Replay:
    """Calls functions of tensors that do the same whenever these have the same shapes: all that Python decides in them
    (a model's ``forward`` is such Python) must follow from shapes and names alone, as under a compiler.

    Attributes:
        AFTER: calls with the same shapes before the next is written down, which takes as long as a few calls.
        KEPT: records; of a federation whose clients have all sizes, no two rounds may look alike.
    """

    AFTER, KEPT = 2, 32

    def __init__(self) -> None:
        self.known: OrderedDict[Any, int | tuple[Callable, TreeSpec] | None] = OrderedDict()

    def __call__(self, function: Callable, *columns: Any) -> Any:
        """``function(*columns)``, or what it comes to. A column is a tensor, or dicts and lists of tensors."""
        inputs = list[Tensor]()
        key = tuple(_flatten(columns, inputs))
        if len({id(tensor) for tensor in inputs}) < len(inputs):  # which of two an operator read would not be known
            return function(*columns)
        found = self.known.pop(key, 0)
        if isinstance(found, tuple):
            self.known[key] = found
            run, spec = found
            with torch.no_grad():
                return tree_unflatten(run(*inputs), spec)
        if found is None or found < self.AFTER:
            self.known[key] = found if found is None else found + 1
            result = function(*columns)
        else:
            result, self.known[key] = _record(function, inputs, columns)
        if len(self.known) > self.KEPT:
            self.known.popitem(last=False)
        return result


def _flatten(tree: Any, leaves: list[Tensor]) -> Iterator[Any]:
    """What tells a tree from others, but for its tensors' values. ``leaves`` gets its tensors."""
    if isinstance(tree, Tensor):
        leaves.append(tree)
        yield tree.shape, tree.stride(), tree.storage_offset(), tree.dtype, tree.device
    else:
        yield tuple(tree) if isinstance(tree, dict) else len(tree)
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from _flatten(part, leaves)


def _record(
    function: Callable, inputs: Sequence[Tensor], columns: Sequence[Any]
) -> tuple[Any, tuple[Callable, TreeSpec] | None]:
    """(the function's result, what replays it; None: it cannot be replayed)."""
    cuda = [t.device for t in inputs if t.device.type == "cuda"][:1]
    draws = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in cuda]
    recorder = _Recorder(inputs)
    try:
        with recorder:
            result = function(*columns)
        failed = False
    except Exception:  # an operator that no mode may look at; what is wrong with the function itself shows again
        failed = True
    if failed:
        torch.set_rng_state(draws[0])
        for device, state in zip(cuda, draws[1]):
            torch.cuda.set_rng_state(state, device)
        return function(*columns), None
    outputs, spec = tree_flatten(result)
    if recorder.foreign or not all(isinstance(output, Tensor) and output in recorder.names for output in outputs):
        return result, None
    return result, (recorder.program(outputs), spec)
