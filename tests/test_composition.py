"""Every normalization with every pruning and every learning rate: two rounds under the loop, vmap and through Ray, each
combination checked for what its parts promise."""

import itertools

import pytest
import torch

from fedsim.checkpoint import state_sha256
from fedsim.errors import ConfigError
from fedsim.strategy import SERVER
from tests.conftest import Small
from tests.test_engine import agree

BASES = ["fedavg", "fedprox", "fedbn", "silobn", "fedwon", "fedavg-gn"]
PRUNING = ["none", "fedtiny"]
RATES = ["constant", "fedhyper-g", "fedhyper-sl", "fedhyper-cl", "fedhyper-g-cl"]
MATRIX = list(itertools.product(BASES, PRUNING, RATES))
LR, DENSITY = 0.02, 0.1


def small(dataset, base, pruning, rate, executor="loop", **more):
    options = {"density": DENSITY, "adjust-every": 1, "adjust-until": 4} if pruning == "fedtiny" else {}
    # float64: which weight is pruned must not hang on the last bit
    return Small(
        dataset,
        algorithm={"strategy": base, "pruning": pruning, "learning-rate": rate, **options},
        training={"lr": LR, "dtype": "float64"},
        simulation={"executor": executor, "block": 2},
        **more,
    )


def check(run: Small, rounds: int = 2) -> dict[str, torch.Tensor]:
    """Run, looking at every order and reply on the way."""
    strategy, federation = run.strategy, run.federation
    state = strategy.init(federation.shared)
    for round in range(1 - strategy.setup_rounds, rounds + 1):
        for order in strategy.orders(round, state):
            names = {*order.shared, *(n.removeprefix("delta.") for n in order.extra)}
            assert not run.task.private & names, "what is private is in no order"
            replies = federation.train(order, [0, 1, 2])
            assert len(replies) == 3, federation.failures
            for partial in replies.partials:
                assert partial.tensors.keys() == order.returned.keys(), "nor in a reply"
                assert not run.task.private & partial.tensors.keys()
            for reply in replies.singles:
                rate = reply.report.get("client-lr")
                assert rate is None or LR / 10 - 1e-9 <= rate <= LR * 10 + 1e-9
            state = strategy.aggregate(round, state, order, replies)
        assert not run.task.private & {n for n in state if not n.startswith(SERVER)}
        figures = strategy.metrics(state)
        assert 1 / 3 - 1e-6 <= figures.get("server-lr", 1.0) <= 3 + 1e-6
        assert LR / 10 - 1e-9 <= figures.get("local-lr", LR) <= LR * 10 + 1e-9
        if "density" in figures:
            masks = {n.removeprefix("@mask."): v for n, v in state.items() if n.startswith("@mask.")}
            total = sum(v.numel() for v in masks.values())
            assert sum(int(v.sum()) for v in masks.values()) == int(DENSITY * total + 0.5)
            assert all(not state[n][~v].any() for n, v in masks.items())
    return state


@pytest.mark.parametrize(("base", "pruning", "rate"), MATRIX)
def test_every_combination_keeps_its_promises_and_vmap_agrees(dataset, base, pruning, rate):
    check(small(dataset, base, pruning, rate))
    runs = [small(dataset, base, pruning, rate, executor) for executor in ("loop", "vmap")]
    agree(*runs, rounds=2, tolerance=1e-7)


@pytest.fixture(scope="module")
def ray_session():
    from fedsim.ray_session import session

    with session(2):
        yield


def through_ray(dataset, base, pruning, rate):
    from fedsim.ray_pool import RayPool

    run = small(dataset, base, pruning, rate, pool=lambda spec: RayPool(spec, 2))
    try:
        return check(run)
    finally:
        run.federation.pool.close()


@pytest.mark.parametrize(("base", "pruning", "rate"), [c for c in MATRIX if c[2] == "fedhyper-g-cl" and c[1] != "none"])
def test_ray_gives_the_bits_of_one_process(dataset, ray_session, base, pruning, rate):
    alone = check(small(dataset, base, pruning, rate))
    assert state_sha256(through_ray(dataset, base, pruning, rate)) == state_sha256(alone)


@pytest.mark.slow
@pytest.mark.parametrize(("base", "pruning", "rate"), MATRIX)
def test_ray_gives_the_bits_of_one_process_in_every_combination(dataset, ray_session, base, pruning, rate):
    alone = check(small(dataset, base, pruning, rate))
    assert state_sha256(through_ray(dataset, base, pruning, rate)) == state_sha256(alone)


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"algorithm": {"strategy": "fedbn"}, "model": {"norm": "none"}}, "no normalization layer"),
        ({"algorithm": {"strategy": "fedhyper-g"}, "training": {"momentum": 0.9}}, "plain SGD"),
        ({"algorithm": {"strategy": "fedtiny"}, "model": {"name": "logistic"}}, "nothing to prune"),
        ({"algorithm": {"strategy": "snip"}}, "public-per-class"),
        ({"algorithm": {"strategy": "local-only", "learning-rate": "fedhyper-g"}}, "shares nothing"),
        ({"algorithm": {"strategy": "local-only", "pruning": "magnitude"}}, "nothing to prune"),
    ],
)
def test_combinations_without_sense_are_refused_with_the_reason(dataset, sections, reason):
    with pytest.raises(ConfigError, match=reason):
        Small(dataset, **sections)
