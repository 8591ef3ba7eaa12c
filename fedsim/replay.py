"""A function of tensors, replayed as the torch operators it comes to.

``vmap`` and ``grad`` find the operators of a step anew at every call: Python and torch's dispatcher, which take longer
than the operators themselves where these are small. They are the same at every call with tensors of the same shapes,
so they are written down once and then called one after the other: the same operators, and the same bits.
"""

from __future__ import annotations

import inspect
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary


class _Recorder(TorchDispatchMode):
    """Writes every operator that runs into a graph.

    Attributes:
        foreign: an operator read a tensor that is neither an input nor made of inputs: its values may be others at the
            next call, so the graph cannot stand for the function.
    """

    def __init__(self, inputs: Sequence[Tensor]):
        super().__init__()
        self.graph, self.foreign = fx.Graph(), False
        self.nodes: Any = WeakTensorKeyDictionary()  # weak: no longer in memory than without a record
        for number, tensor in enumerate(inputs):
            self.nodes[tensor] = self.graph.placeholder(f"input_{number}")

    def node(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        found = self.nodes.get(value)
        self.foreign |= found is None
        return found

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = tree_map(self.node, (args, kwargs))
        result = function(*args, **kwargs)
        node = self.graph.call_function(function, *read)
        if isinstance(result, Tensor):
            self.nodes[result] = node
        else:
            for number, part in enumerate(result if isinstance(result, Sequence) else ()):
                if isinstance(part, Tensor):
                    self.nodes[part] = self.graph.call_function(operator.getitem, (node, number))
        return result


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
        yield tree.shape, tree.stride(), tree.dtype, tree.device
    else:
        yield tuple(tree) if isinstance(tree, dict) else len(tree)
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from _flatten(part, leaves)


def _record(
    function: Callable, inputs: Sequence[Tensor], columns: Sequence[Any]
) -> tuple[Any, tuple[Callable, TreeSpec] | None]:
    """(the function's result, what replays it; None: it cannot be replayed)."""
    try:
        with _Recorder(inputs) as recorder:
            result = function(*columns)
    except Exception:  # an operator that no mode may look at; what is wrong with the function itself shows again
        return function(*columns), None
    outputs, spec = tree_flatten(result)
    recorder.graph.output([recorder.node(output) for output in outputs])
    if recorder.foreign:
        return result, None
    return result, (fx.GraphModule({}, recorder.graph).forward, spec)
