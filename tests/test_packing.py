"""Packed states are the states, bit by bit, and their bytes are the library's."""

import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from fedsim.packing import Packed, States, columns
from fedsim.types import ClientState
from fedsim.worker import BlockResult, EvaluationJob, Jobs

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
def test_bytes_are_a_safetensors_file(tree):
    data = Packed.of(ClientState(tree, {"m": torch.ones(2)})).to_bytes()
    named = {f"p/{i:06d}/{name}": value.contiguous() for i, (name, value) in enumerate(tree.items())}
    assert data == save({**named, "m/000000/m": torch.ones(2)})
    same({name: load(data)[name] for name in named}, named)
    found = Packed.from_bytes(data).unpack()
    same(found.private, tree)
    same(found.memory, {"m": torch.ones(2)})


@pytest.mark.parametrize("count", [1, 3])
def test_what_is_unpacked_may_be_written_to(count):
    packed = [Packed.of(ClientState(TREE, {})) for _ in range(count)]
    packed[0].unpack().private["w"].zero_()
    columns(packed)[0]["w"].zero_()
    for row in range(count):
        same(packed[row].unpack().private, TREE)
        same({name: value[row] for name, value in columns(packed)[0].items()}, TREE)


def state(seed, memory=False):
    draw = torch.Generator().manual_seed(seed)
    private = {"w": torch.randn(3, generator=draw), "count": torch.randint(9, (), generator=draw)}
    return ClientState(private, {"rate": torch.randn(1, generator=draw)} if memory else {})


def test_states_travel_as_rows():
    initial = state(0)
    states = [initial, state(1), state(2, memory=True), initial, state(3, memory=True), ClientState({}, {})]
    packed = [Packed.of(one) for one in states]
    sent = pickle.loads(pickle.dumps(States([packed[0], *packed[1:3], packed[0], *packed[4:]])))
    assert len(sent) == len(states)
    for mine, theirs in zip(states, (one.unpack() for one in sent)):
        same(mine.private, theirs.private)
        same(mine.memory, theirs.memory)
    assert sent[0] is sent[3], "a state that occurs twice is sent once"


def test_a_message_of_many_states_has_one_array():
    """Whatever is pickled by itself costs more than a small state."""
    buffers = []
    result = BlockResult(states={client: Packed.of(state(client)) for client in range(50)})
    data = pickle.dumps(result, protocol=5, buffer_callback=buffers.append)
    assert len(buffers) == 1
    sent = pickle.loads(data, buffers=buffers)
    assert list(sent.states) == list(range(50))
    same(sent.states[49].unpack().private, state(49).private)


def test_a_message_of_many_models_to_evaluate_has_one_array_of_them():
    indices, buffers = np.arange(5), []
    jobs = Jobs(
        EvaluationJob(k, "d", "test", indices, Packed.of(state(k, memory=True)).without_memory()) for k in range(50)
    )
    jobs.append(EvaluationJob(-1, "d", "test", indices))
    data = pickle.dumps(jobs, protocol=5, buffer_callback=buffers.append)
    assert sum(memoryview(b).nbytes > 40 for b in buffers) == 1
    sent = pickle.loads(data, buffers=buffers)
    assert [job.client for job in sent] == [*range(50), -1]
    same(sent[49].private.unpack().private, state(49).private)
    assert sent[49].private.unpack().memory == {}, "no evaluation needs it"
    assert sent[50].private.unpack().private == {}
