"""Evaluation modes against torch and numpy; under both executors; without a trace in training."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from clients.evaluation import AdaBN, AlphaBN, MeanStatistics, PooledStatistics, Reestimated, TestBatch, UnMixTNS
from fedsim.checkpoint import state_sha256
from fedsim.errors import ConfigError
from fedsim.evaluation import Mode, mode_batches, mode_names, modes_of
from fedsim.models import build_model
from tests.conftest import DOMAINS, Small

TestBatch.__test__ = False  # pytest takes it for a test
TARGET_MODES = "adabn,test-batch,alpha-bn,unmix-tns"
PRIVATE_MODES = f"own,mean,pooled,reestimated,{TARGET_MODES}"
SHARED_MODES = f"global,reestimated,{TARGET_MODES}"


def nothing():
    return iter(())


def batches(count: int = 3, shape=(5, 3, 12, 12), seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw) * (i + 1) + i for i in range(count)]


def trained_model() -> nn.Module:
    """A small CNN whose statistics, gammas and betas are of no use by accident."""
    torch.manual_seed(3)
    model = build_model("small-cnn", classes=4, shape=(3, 12, 12), norm="bn")
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            for tensor in (layer.weight.data, layer.bias.data, layer.running_mean, layer.running_var):
                tensor.uniform_(0.5, 1.5)
    return model.eval()


def close(found, expected):
    torch.testing.assert_close(found, torch.as_tensor(expected).to(found.dtype), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def predictions(mode: Mode, model: nn.Module, target, source=nothing) -> list[torch.Tensor]:
    with mode.open(model, lambda: iter(target), source) as predict:
        return [predict(x) for x in target]


@pytest.mark.parametrize("mode", [Reestimated(), AdaBN()])
def test_reestimation_equals_torchs_update_bn(mode):
    data, target = batches(3), batches(2, seed=1)
    expected = trained_model()
    update_bn(data if isinstance(mode, Reestimated) and not isinstance(mode, AdaBN) else target, expected)
    model = trained_model()
    found = predictions(mode, model, target, lambda: iter(data))
    for a, x in zip(found, target):
        close(a, expected.eval()(x).detach())
    stats = [n for n in model.state_dict() if "running" in n]
    assert stats
    for name in stats:
        close(model.state_dict()[name], expected.state_dict()[name])


def test_test_batch_statistics_equal_torchs_training_mode():
    target, expected = batches(2), trained_model()
    for layer in expected.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.train()
    for a, x in zip(predictions(TestBatch(), trained_model(), target), target):
        close(a, expected(x).detach())


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", [(5, 6, 4, 3), (5, 6)])
def test_alpha_bn_equals_numpy(alpha, shape):
    layer = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(6).eval()
    for tensor in (layer.weight.data, layer.bias.data, layer.running_mean, layer.running_var):
        tensor.uniform_(0.5, 1.5)
    (x,) = batches(1, shape)
    z = np.moveaxis(x.double().numpy(), 1, -1)
    flat = z.reshape(-1, 6)
    gamma, beta, mean, var = (
        v.detach().double().numpy() for v in (layer.weight, layer.bias, layer.running_mean, layer.running_var)
    )
    mean, var = (1 - alpha) * mean + alpha * flat.mean(0), (1 - alpha) * var + alpha * flat.var(0, ddof=1)
    expected = np.moveaxis(gamma * (z - mean) / np.sqrt(var + 1e-5) + beta, -1, 1)
    (found,) = predictions(AlphaBN(alpha), nn.Sequential(layer), [x])
    close(found, expected)


def unmixed(x, mu, var, gamma, beta, momentum=0.1):
    """UnMix-TNS image by image and component by component. x [B, C, H, W]; mu, var [K, C], updated."""
    out, k = np.empty_like(x), len(mu)
    move_mu, move_var = np.zeros_like(mu), np.zeros_like(var)
    for b, image in enumerate(x):
        m, v = image.mean((1, 2)), image.var((1, 2))
        alike = np.array([m @ c / (np.linalg.norm(m) * np.linalg.norm(c)) for c in mu])
        p = np.exp(alike / 0.07)
        p = p / p.sum()
        means = np.stack([(1 - p[j]) * mu[j] + p[j] * m for j in range(k)])
        variances = np.stack([(1 - p[j]) * var[j] + p[j] * v for j in range(k)])
        mean = means.mean(0)
        total = variances.mean(0) + (means**2).mean(0) - mean**2
        scaled = (image - mean[:, None, None]) / np.sqrt(total + 1e-5)[:, None, None]
        out[b] = gamma[:, None, None] * scaled + beta[:, None, None]
        move_mu += p[:, None] * (m - mu) / len(x)
        move_var += p[:, None] * (v - var) / len(x)
    eta = 1 - (1 - momentum) ** (len(x) / 64)
    mu += eta * move_mu
    var += eta * move_var
    return out


@pytest.mark.parametrize("components", [1, 4])
def test_unmix_tns_equals_numpy(components):
    layer = nn.BatchNorm2d(6).eval()
    for tensor in (layer.weight.data, layer.bias.data, layer.running_mean, layer.running_var):
        tensor.uniform_(0.5, 1.5)
    mode, target = UnMixTNS(components, seed=1), batches(3, (5, 6, 4, 3))
    mu, var = (v.double().numpy() for v in mode.start(layer.running_mean, layer.running_var, generator()))
    gamma, beta = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
    for found, x in zip(predictions(mode, nn.Sequential(layer), target), target):
        close(found, unmixed(x.double().numpy(), mu, var, gamma, beta))


def generator():
    from fedsim.random import torch_generator

    return torch_generator(1, purpose="evaluate")


def test_unmix_tns_starts_around_the_source_and_leaves_vectors_to_it():
    mean, var = torch.arange(3.0), torch.tensor([1.0, 4.0, 9.0])
    mu, spread = UnMixTNS(4000, 0).start(mean, var, generator())
    torch.testing.assert_close(mu.mean(0), mean, rtol=0, atol=0.15)
    torch.testing.assert_close(mu.var(0) + spread.mean(0), var, rtol=0.1, atol=0)  # the mixture has the source's
    model, target = nn.Sequential(nn.BatchNorm1d(6)).eval(), batches(1, (5, 6))
    close(predictions(UnMixTNS(4, 0), model, target)[0], model(target[0]).detach())


@pytest.mark.parametrize(
    "mode", [Reestimated(), AdaBN(), TestBatch(), AlphaBN(0.3), UnMixTNS(3, 0)], ids=lambda m: type(m).__name__
)
def test_a_mode_leaves_the_modules_as_they_were(mode):
    model = trained_model()
    before, target = copy.deepcopy(model), batches(2)
    predictions(mode, model, target, lambda: iter(target))
    model.load_state_dict(before.state_dict())
    assert torch.equal(model(target[0]), before(target[0]))
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]


def test_mean_and_pooled_statistics_equal_numpy():
    draw = np.random.default_rng(0)
    clients = [
        {
            "a.running_mean": torch.tensor(draw.normal(size=3)),
            "a.running_var": torch.tensor(draw.uniform(1, 2, 3)),
            "a.weight": torch.ones(3),
            "a.num_batches_tracked": torch.tensor(4),
        }
        for _ in range(4)
    ]
    means = np.stack([c["a.running_mean"].numpy() for c in clients])
    variances = np.stack([c["a.running_var"].numpy() for c in clients])
    plain, pooled = MeanStatistics().gather(clients), PooledStatistics().gather(clients)
    assert plain.keys() == pooled.keys() == {"a.running_mean", "a.running_var"}
    for found in (plain, pooled):
        close(found["a.running_mean"], means.mean(0))
    close(plain["a.running_var"], variances.mean(0))
    close(pooled["a.running_var"], (variances + means**2).mean(0) - means.mean(0) ** 2)


def scored(dataset, strategy: str, modes: str, rounds: int = 2, never: str = "initial", **sections):
    """(the federation after training, {mode: scores})."""
    small = Small(
        dataset,
        algorithm={"strategy": strategy},
        evaluation={"modes": modes, "batch-size": 8, "never-sampled": never},
        **sections,
    )
    small.federation.never_sampled = never
    state = small.run(rounds)
    return small, state, {m: small.federation.evaluate_mode(state, m) for m in small.spec.modes}


@pytest.mark.parametrize(("strategy", "modes"), [("fedbn", PRIVATE_MODES), ("fedavg", SHARED_MODES)])
def test_modes_agree_under_loop_and_vmap(dataset, strategy, modes):
    found = [
        scored(dataset, strategy, modes, simulation={"executor": e}, training={"dtype": "float64"})[2]
        for e in ("loop", "vmap")
    ]
    for mode in found[0]:
        assert found[0][mode], mode
        for a, b in zip(found[0][mode], found[1][mode]):
            assert (a.client, a.domain, a.correct, a.examples) == (b.client, b.domain, b.correct, b.examples)
            assert a.loss == pytest.approx(b.loss, rel=1e-5)


@pytest.mark.parametrize(("strategy", "mode"), [("fedbn", "own"), ("silobn", "own"), ("fedavg", "global")])
def test_the_ordinary_evaluation_is_a_mode(dataset, strategy, mode):
    small, state, found = scored(dataset, strategy, mode)
    for a, b in zip(small.federation.evaluate(state), found[mode], strict=True):
        assert (a.client, a.domain, a.split, a.correct) == (b.client, b.domain, b.split, b.correct)
        assert a.loss == pytest.approx(b.loss, rel=1e-5)


def test_reestimation_uses_each_clients_own_training_examples(dataset):
    """With shared statistics, too: FedAvg's model is then another one on every client."""
    small, state, found = scored(dataset, "fedavg", "reestimated")
    assert [s.client for s in found["reestimated"]] == [0, 1, 2]
    for score in found["reestimated"]:
        model = copy.deepcopy(small.task.model)
        model.load_state_dict(state)
        worker, shard = small.federation.pool.worker, small.shards[score.client]
        update_bn([worker.examples.batch("train", i)[0] for i in mode_batches(shard, 8, small.config.seed)], model)
        x, y = worker.examples.batch("test", dataset.slice(score.domain, "test"))
        expected = nn.functional.cross_entropy(model.eval()(x).detach(), y, reduction="sum")
        assert score.loss == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("executor", ["loop", "vmap"])
def test_modes_leave_no_trace_in_training(dataset, executor):
    def run(modes: str):
        small = Small(
            dataset, algorithm={"strategy": "fedbn"}, evaluation={"modes": modes}, simulation={"executor": executor}
        )
        federation, state = small.federation, small.strategy.init(small.federation.shared)
        for round in (1, 2):
            (order,) = small.strategy.orders(round, state)
            state = small.strategy.aggregate(round, state, order, federation.train(order, [0, 1, 2]))
            for mode in small.spec.modes:
                federation.evaluate_mode(state, mode)
        return state_sha256(
            {**state, **{f"{c}/{n}": v for c in range(3) for n, v in federation.state(c).private.items()}}
        )

    assert run("") == run(PRIVATE_MODES)


def test_a_client_never_sampled_is_a_newcomer_if_asked(dataset):
    results = {}
    for never in ("initial", "mean"):
        small = Small(dataset, algorithm={"strategy": "fedbn"}, evaluation={"modes": "own"})
        federation = small.federation
        federation.never_sampled = never
        state = small.strategy.init(federation.shared)
        (order,) = small.strategy.orders(1, state)
        state = small.strategy.aggregate(1, state, order, federation.train(order, [0, 1]))
        jobs = []
        federation._evaluate = lambda shared, given, jobs=jobs: jobs.extend(given) or []
        federation.evaluate_mode(state, "own")
        results[never] = jobs[2].private.unpack().private
        rule = federation.private if never == "initial" else federation.newcomer()
        assert all(torch.equal(jobs[2].private.unpack().private[n], rule[n]) for n in rule)
        assert all(torch.equal(jobs[0].private.unpack().private[n], federation.state(0).private[n]) for n in rule)
    assert any(not torch.equal(results["initial"][n], results["mean"][n]) for n in results["mean"])


def test_modes_on_a_domain_left_out(dataset):
    from tests.conftest import shards_of

    modes = f"own,mean,pooled,reestimated,{TARGET_MODES},oracle"
    small = Small(
        dataset,
        shards_of(dataset, (40, 33)),
        algorithm={"strategy": "fedbn"},
        evaluation={"modes": modes},
        federation={"leave-out": DOMAINS[2]},
    )
    federation = small.federation
    federation.unseen = DOMAINS[2]
    state = small.run(2)
    found = {m: federation.evaluate_mode(state, m, "unseen") for m in small.spec.modes}
    assert {m for m, scores in found.items() if not scores} == {"own", "reestimated"}
    assert all(s.domain == DOMAINS[2] and s.split == "unseen" for scores in found.values() for s in scores)
    (newcomer,) = federation.evaluate(state, "unseen")
    assert found["mean"][0].loss == pytest.approx(newcomer.loss, rel=1e-5)
    model, hits = copy.deepcopy(small.task.model), []
    x, y = federation.pool.worker.examples.batch("test", dataset.slice(DOMAINS[2], "test"))
    for client in (0, 1):
        model.load_state_dict({**state, **federation.state(client).private})
        hits.append(int((model.eval()(x).argmax(1) == y).sum()))
    assert [s.correct for s in found["oracle"]] == [max(hits)]


def test_batches_of_a_mode_are_even_and_shuffled():
    cut = mode_batches(np.arange(501), 250, seed=0)
    assert [len(b) for b in cut] == [167, 167, 167]
    assert sorted(np.concatenate(cut)) == list(range(501))
    assert not np.array_equal(np.concatenate(cut), np.arange(501))


@pytest.mark.parametrize(
    ("strategy", "modes", "reason"),
    [
        ("fedavg", "own", "no client has its own; expected 'global'"),
        ("fedavg", "mean", "no client has its own"),
        ("fedbn", "global", "the server has none; expected 'own'"),
        ("fedbn", "oracle", "set federation.leave-out"),
        ("fedwon", "adabn", "has no running statistics"),
        ("fedbn", "adabm", "did you mean 'adabn'"),
    ],
)
def test_a_mode_that_makes_no_sense_is_refused_with_the_reason(dataset, strategy, modes, reason):
    with pytest.raises(ConfigError, match=reason):
        Small(dataset, algorithm={"strategy": strategy}, evaluation={"modes": modes})


def test_a_batch_of_one_is_refused_by_the_modes_that_look_at_batches(dataset):
    with pytest.raises(ConfigError, match="batch-size is 1; expected 2"):
        Small(dataset, evaluation={"modes": "alpha-bn", "batch-size": 1})


def test_statistics_of_other_layers_are_refused(dataset):
    with pytest.raises(ConfigError, match="a statistic of no BatchNorm layer"):
        Small(dataset, algorithm={"normalization": "evonorm-b0"}, evaluation={"modes": "adabn"})


def test_every_mode_is_tested():
    assert set(mode_names()) == {*PRIVATE_MODES.split(","), *SHARED_MODES.split(","), "oracle"}


@pytest.mark.parametrize(("modes", "never"), [("mean", "initial"), ("oracle", "initial"), ("own", "mean")])
def test_a_deployment_refuses_what_only_a_simulation_knows(dataset, modes, never):
    small = Small(dataset, algorithm={"strategy": "fedbn"})
    section = small.config.evaluation.model_copy(update={"modes": modes, "never_sampled": never})
    with pytest.raises(ConfigError, match=r"real clients never send|a simulation alone"):
        modes_of(small.config.model_copy(update={"evaluation": section}), small.task, deployed=True)
