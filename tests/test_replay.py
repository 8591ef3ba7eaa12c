"""Steps replayed as the operators they come to: the bits of the steps themselves, or no replay."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad_and_value, vmap

from fedsim import vectorized
from fedsim.checkpoint import state_sha256
from fedsim.replay import Replay, _Recorder
from tests.conftest import Small


class Never(Replay):
    def __call__(self, function, *columns):
        return function(*columns)


def replays(monkeypatch, kind=Replay):
    """Those that the runs from now on make."""
    made = []

    def make():
        made.append(kind())
        return made[-1]

    monkeypatch.setattr(vectorized, "Replay", make)
    return made


def records(replay):
    return [found for found in replay.known.values() if isinstance(found, tuple)]


@pytest.mark.parametrize("precision", ["full", "bf16"])
@pytest.mark.parametrize(
    ("strategy", "model"),
    [
        ("fedavg", {"name": "logistic"}),
        ("fedbn", {"name": "small-cnn", "norm": "bn"}),
        ("fedavg", {"name": "small-cnn", "norm": "gn"}),
        ("fedavg", {"name": "mcmahan-cnn"}),
    ],
)
def test_replayed_steps_have_the_bits_of_steps(dataset, monkeypatch, strategy, model, precision):
    sections = {
        "algorithm": {"strategy": strategy},
        "model": model,
        "training": {"precision": precision, "batch-size": 7},
        "simulation": {"executor": "vmap"},
    }
    with monkeypatch.context() as patch:
        replays(patch, Never)
        expected = Small(dataset, **sections).run(4)
    made = replays(monkeypatch)
    found = Small(dataset, **sections).run(4)
    assert any(records(replay) for replay in made), "something was replayed"
    assert state_sha256(found) == state_sha256(expected)


@pytest.mark.parametrize("strategy", ["fedprox", "fedwon", "fedtiny", "fedhyper-g-cl", "fedrep"])
def test_what_may_follow_the_order_is_not_replayed(dataset, monkeypatch, strategy):
    made = replays(monkeypatch)
    small = Small(dataset, algorithm={"strategy": strategy}, simulation={"executor": "vmap"})
    small.run(2)
    hooked = any(p.overrides("begin", "loss", "update") for p in small.task.plugins)
    assert bool(made) != hooked


def of_clients(model, x, y):
    """Gradients and losses of a step of stacked clients, and their buffers after it."""

    def loss(params, buffers, x, y):
        buffers = {n: v.clone() for n, v in buffers.items()}
        return nn.functional.mse_loss(functional_call(model, {**params, **buffers}, (x,)), y), buffers

    def step(params, buffers, x, y):
        one = lambda *columns: grad_and_value(loss, has_aux=True)(*columns)  # noqa: E731
        return vmap(one, randomness="different")(params, buffers, x, y)

    k = len(x)
    params = {n: v.detach().expand(k, *v.shape).clone() for n, v in model.named_parameters()}
    buffers = {n: v.expand(k, *v.shape).clone() for n, v in model.named_buffers()}
    return step, (params, buffers, x, y)


def equal(a, b):
    flat = lambda tree: torch.utils._pytree.tree_flatten(tree)[0]  # noqa: E731
    return all(torch.equal(u, v) for u, v in zip(flat(a), flat(b), strict=True))


def test_dropout_draws_anew_and_what_it_would_draw():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2))
    step, columns = of_clients(model, torch.randn(3, 5, 6), torch.randn(3, 5, 2))
    torch.manual_seed(1)
    expected = [step(*columns) for _ in range(6)]
    torch.manual_seed(1)
    replay = Replay()
    found = [replay(step, *columns) for _ in range(6)]
    assert len(records(replay)) == 1
    assert all(map(equal, found, expected))
    assert not equal(found[4], found[5])


def test_values_of_inputs_are_read_anew():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    step, (params, buffers, x, y) = of_clients(model, torch.randn(3, 5, 1, 6, 6), torch.randn(3, 5, 2))
    replay = Replay()
    for _ in range(5):
        params = {n: v + 0.1 for n, v in params.items()}
        x = x + 1
        assert equal(replay(step, params, buffers, x, y), step(params, buffers, x, y))
    assert len(records(replay)) == 1


def test_a_function_that_reads_another_tensor_is_called_every_time():
    other = torch.ones(3)
    replay = Replay()
    for _ in range(5):
        assert torch.equal(replay(lambda x, other=other: x + other, torch.zeros(3)), other)
        other = other + 1
    assert not records(replay)


def test_what_cannot_be_written_down_is_called_every_time_and_draws_what_it_would(monkeypatch):
    dispatch, calls = _Recorder.__torch_dispatch__, []

    def refuses(self, function, *rest):
        calls.append(function)
        if len(calls) == 2:
            raise NotImplementedError
        return dispatch(self, function, *rest)

    monkeypatch.setattr(_Recorder, "__torch_dispatch__", refuses)
    draw = lambda x: torch.rand_like(x) + 1  # noqa: E731
    torch.manual_seed(1)
    expected = [draw(torch.zeros(3)) for _ in range(5)]
    torch.manual_seed(1)
    replay = Replay()
    assert all(torch.equal(replay(draw, torch.zeros(3)), e) for e in expected)
    assert list(replay.known.values()) == [None]


def test_a_generator_of_the_functions_own_draws_on():
    expected, found = (torch.Generator().manual_seed(1) for _ in range(2))
    noise = lambda g: lambda x: x + torch.randn(x.shape, generator=g)  # noqa: E731
    replay = Replay()
    for _ in range(6):
        x = torch.zeros(4)
        assert torch.equal(replay(noise(found), x), noise(expected)(x))


def test_one_tensor_in_two_places_is_not_taken_for_two():
    replay, a, b = Replay(), torch.ones(3), torch.full((3,), 5.0)
    weigh = lambda x, y: x + 10 * y  # noqa: E731
    for _ in range(4):
        assert torch.equal(replay(weigh, a, a), 11 * a)
    assert torch.equal(replay(weigh, a, b), a + 10 * b)


def test_a_view_at_another_place_is_another_input():
    base, replay = torch.arange(8.0), Replay()
    again = lambda x: x.as_strided((4,), (1,), x.storage_offset()) * 1  # noqa: E731
    for _ in range(4):
        for part in base.split(4):
            assert torch.equal(replay(again, part), part)


def test_lists_of_tensors_and_several_results():
    replay = Replay()

    def both(x, parts):
        high, place = torch.cat([x, *parts]).max(0)
        return {"high": high, "place": place, "parts": [p.clone() for p in torch.stack(parts).unbind(0)]}

    for number in range(5):
        x, parts = torch.randn(2, 3), [torch.randn(2, 3) + number for _ in range(3)]
        assert equal(replay(both, x, parts), both(x, parts))
    assert len(records(replay)) == 1


class Doubled(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def test_functions_with_their_own_backward_are_replayed():
    class Model(nn.Linear):
        def forward(self, x):
            return Doubled.apply(super().forward(x))

    step, columns = of_clients(Model(4, 2), torch.randn(3, 5, 4), torch.randn(3, 5, 2))
    replay = Replay()
    assert all(equal(replay(step, *columns), step(*columns)) for _ in range(5))
    assert len(records(replay)) == 1


def test_shapes_strides_types_and_names_are_told_apart():
    replay = Replay()
    double = lambda tree: {n: v * 2 for n, v in tree.items()}  # noqa: E731
    trees = [
        {"a": torch.ones(2, 3)},
        {"a": torch.ones(3, 2).t()},
        {"a": torch.ones(2, 3, dtype=torch.float64)},
        {"b": torch.ones(2, 3)},
        {"a": torch.ones(2, 3), "b": torch.ones(2)},
        {},
    ]
    for _ in range(4):
        for tree in trees:
            found = replay(double, tree)
            assert found.keys() == tree.keys()
            assert all(torch.equal(found[n], v * 2) and found[n].dtype == v.dtype for n, v in tree.items())
    assert len(records(replay)) == len(trees)


def test_no_more_records_are_kept_than_allowed():
    replay = Replay()
    for size in range(1, 2 * Replay.KEPT):
        for _ in range(4):
            assert replay(lambda x: x + 1, torch.zeros(size)).sum() == size
    assert len(replay.known) == Replay.KEPT
