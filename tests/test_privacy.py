"""Property: over all normalization variants, what is private never appears in a message, by name or by value."""

from dataclasses import replace

import pytest
from flwr.common.serde import recorddict_to_proto
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fedsim.deployment.wire import pack
from fedsim.flower import order_content, reply_content
from fedsim.registry import parts
from tests.conftest import Small

NORMALIZATIONS = sorted(parts("normalization"))
# Private heads, memories and reports of their own. Not Ditto: its personal model starts as the shared one, and after a
# step or two some of its tensors are still equal to those that are sent.
STRATEGIES = ("fedavg", "fedper", "scaffold", "fednova")


def wire(content) -> bytes:
    return recorddict_to_proto(content).SerializeToString()


def telling(tensors) -> dict[str, tuple[bytes, bytes]]:
    """The values of the tensors that are not the same number all over, which could be found by accident, in the two
    forms that a message has: all of them, and those that are not zero."""
    found = {n: v.flatten() for n, v in tensors.items() if v.is_floating_point() and v[v != 0].unique().numel() >= 4}
    return {n: (v.numpy().tobytes(), v[v != 0].numpy().tobytes()) for n, v in found.items()}


def says(message: bytes, forms: tuple[bytes, bytes]) -> bool:
    return any(form in message for form in forms)


def test_the_normalization_axis_is_what_it_was_thought_to_be():
    assert {"local", "local-statistics", "shared", "pooled-statistics", "bcn", "adab2n"} <= set(NORMALIZATIONS)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@settings(
    max_examples=2,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(strategy=st.sampled_from(STRATEGIES), executor=st.sampled_from(["loop", "vmap"]), seed=st.integers(0, 2**20))
def test_what_is_private_never_appears_in_a_message(dataset, normalization, strategy, executor, seed):
    small = Small(
        dataset,
        seed=seed,
        algorithm={"strategy": strategy, "normalization": normalization},
        training={"steps": 2, "lr": 0.01},
        simulation={"executor": executor, "block": 3},
    )
    private, federation = small.task.private, small.federation
    # FedPer keeps the head; affine-only training freezes it.
    assert bool(private) == (
        normalization in ("local", "local-statistics") or (strategy == "fedper" and normalization != "affine-only")
    )
    state = small.strategy.init(federation.shared)
    for round in (1, 2):
        for number, order in enumerate(small.strategy.orders(round, state)):
            secrets = [telling(federation.state(c).private) for c in range(3)] if round > 1 else []
            replies = federation.train(replace(order, fold=False), [0, 1, 2]).singles
            assert [r.client for r in replies] == [0, 1, 2]
            secrets += [telling(federation.state(c).private) for c in range(3)]
            contents = [order_content(order, number), *(reply_content(r, number, order.masks) for r in replies)]
            sent = [wire(form(content)) for content in contents for form in (lambda c: c, pack)]
            for names in [order.shared, order.extra, *(r.shared for r in replies), *(r.report for r in replies)]:
                assert not [n for n in names if n.endswith(tuple(private))], "by name"
            for tensors in secrets:
                assert not [n for n, raw in tensors.items() if any(says(m, raw) for m in sent)], "by value"
            # The search does find what is sent.
            shared = telling({n: v for n, v in replies[0].shared.items() if n not in order.masks})
            assert all(says(sent[2], raw) and says(sent[3], raw) for raw in shared.values())
            assert shared
            state = small.strategy.aggregate(round, state, order, federation.train(order, [0, 1, 2]))
