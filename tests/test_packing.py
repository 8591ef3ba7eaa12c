"""Packed states are the states, bit by bit, and their bytes are the library's."""

import pickle

import pytest
import torch
from safetensors.torch import load, save

from fedsim.packing import States, from_bytes, to_bytes
from fedsim.types import ClientState
from fedsim.worker import BlockResult

TREE = {
    "w": torch.arange(6.0).reshape(2, 3),
    "double": torch.tensor([0.1], dtype=torch.float64),
    "count": torch.tensor(7),
    "half": torch.tensor([1.5, -2.5], dtype=torch.bfloat16),
    "mask": torch.tensor([[True, False], [False, True]]),
    "none": torch.empty(0, 3),
    "strided": torch.arange(12.0).reshape(3, 4).t(),
}


def same(a, b):
    assert list(a) == list(b)
    for name, value in a.items():
        assert value.dtype == b[name].dtype, name
        assert torch.equal(value, b[name]), name


@pytest.mark.parametrize("tree", [TREE, {}, {"one": torch.tensor(3.0)}])
def test_bytes_are_those_of_the_library(tree):
    for _ in range(2):  # made from the library's header, then from the one that is known
        data = to_bytes(tree)
        assert data == save({name: value.contiguous() for name, value in tree.items()})
        found = from_bytes(data)
        assert found.keys() == tree.keys()
        same({name: found[name] for name in tree}, tree)
        same({name: load(data)[name] for name in tree}, tree)


def test_what_is_read_may_be_written_to():
    data = to_bytes(TREE)
    from_bytes(data)["w"].zero_()
    assert torch.equal(from_bytes(data)["w"], TREE["w"])


def state(seed, memory=False):
    draw = torch.Generator().manual_seed(seed)
    private = {"w": torch.randn(3, generator=draw), "count": torch.randint(9, (), generator=draw)}
    return ClientState(private, {"rate": torch.randn(1, generator=draw)} if memory else {})


def test_states_travel_as_columns():
    initial = state(0)
    states = [initial, state(1), state(2, memory=True), initial, state(3, memory=True), ClientState({}, {})]
    sent = pickle.loads(pickle.dumps(States(states)))
    assert len(sent) == len(states)
    for mine, theirs in zip(states, sent):
        same(mine.private, theirs.private)
        same(mine.memory, theirs.memory)
    assert sent[0] is sent[3], "a state that occurs twice is sent once"


def test_a_message_of_many_states_has_few_tensors(monkeypatch):
    """Pickle calls a tensor's reducer once for each: the number must not grow with the clients."""
    reduced, reduce = [], torch.Tensor.__reduce_ex__

    def counted(self, protocol):
        reduced.append(self)
        return reduce(self, protocol)

    monkeypatch.setattr(torch.Tensor, "__reduce_ex__", counted)
    result = BlockResult(states={client: state(client) for client in range(50)})
    sent = pickle.loads(pickle.dumps(result))
    assert len(reduced) == 2
    assert list(sent.states) == list(range(50))
    same(sent.states[49].private, state(49).private)
