"""Adapters against a loop over examples of plain networks that have absorbed each example's mixture."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from clients.adapters import Adapters
from clients.ssf import MATCHING, Adapted, PooledHead, ScaleAndShift, adapt, merged, places
from fedsim.build import task_of
from fedsim.errors import ConfigError
from fedsim.models import build_model
from fedsim.registry import resolve, server_of
from fedsim.types import Order, View
from tests.conftest import Small, small_config
from tests.test_engine import agree

POOL, TOP, LAMBDA = 5, 2, 0.1


def backbone(name: str = "vit-tiny-32", classes: int = 4, size: int = 12) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(name, classes=classes, shape=(3, size, size)).double()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.05 * torch.randn_like(value))  # nothing may be zero or one by accident
    return model.eval()


def adapted(plain: nn.Module, pool: int = POOL, top: int = TOP, batch_mean: bool = False) -> Adapted:
    torch.manual_seed(1)
    return adapt(copy.deepcopy(plain), pool, top, batch_mean).double().eval()


def absorbed(plain: nn.Module, model: Adapted, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Weights of the plain network for one example that uses ``rows``: differentiable in the pool."""
    weights = dict(plain.state_dict())
    for path, module in model.backbone.named_modules():
        if isinstance(module, ScaleAndShift):
            gamma, beta = module.gamma[rows].mean(0), module.beta[rows].mean(0)
            w, b = weights[f"{path}.weight"], weights[f"{path}.bias"]
            weights[f"{path}.weight"] = w * gamma.view(-1, *[1] * (w.dim() - 1))
            weights[f"{path}.bias"] = b * gamma + beta
        if isinstance(module, PooledHead):
            weights[f"{path}.weight"] = module.weight[rows].mean(0)
            weights[f"{path}.bias"] = module.bias[rows].mean(0)
    return weights


@pytest.mark.parametrize("name", ["vit-tiny-32", "small-cnn"])
def test_selection_loss_and_gradients_equal_a_loop_over_examples(name):
    plain = backbone(name)
    model = adapted(plain)
    x, y = torch.randn(6, 3, 12, 12, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])
    head = "head" if name == "vit-tiny-32" else "classifier.1"
    queries = []
    handle = plain.get_submodule(head).register_forward_pre_hook(lambda _, inputs: queries.append(inputs[0].detach()))
    plain(x)
    handle.remove()
    cosines = F.cosine_similarity(queries[0][:, None], model.keys[None], dim=-1)  # [B, P]
    torch.testing.assert_close(model.similarity(x), cosines)

    losses, logits = [], []
    for i in range(len(x)):
        rows = torch.tensor(sorted(range(POOL), key=lambda p: -cosines[i, p].item())[:TOP])
        logits.append(functional_call(plain, absorbed(plain, model, rows), (x[i : i + 1],))[0])
        ce = F.cross_entropy(logits[-1][None], y[i : i + 1])
        losses.append((1 - LAMBDA) * ce + LAMBDA * (1 - cosines[i, rows].sum()))
    expected = torch.stack(losses).mean()

    out, aux = model(x)
    view = View(Order(1, {}), {}, aux=aux)
    loss = Adapters(POOL, TOP, LAMBDA).loss(F.cross_entropy(out, y), {}, view)
    torch.testing.assert_close(out, torch.stack(logits))
    torch.testing.assert_close(loss, expected)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    ours, theirs = (torch.autograd.grad(value, list(trained.values())) for value in (loss, expected))
    for path, a, b in zip(trained, ours, theirs):
        torch.testing.assert_close(a, b, msg=lambda m, path=path: f"{path}: {m}")


def test_an_example_has_the_same_logits_in_any_batch_unless_rows_are_averaged_over_it():
    plain, x = backbone(), torch.randn(5, 3, 12, 12, dtype=torch.float64)
    model = adapted(plain)
    torch.testing.assert_close(model(x)[0][:1], model(x[:1])[0])
    released = adapted(plain, batch_mean=True)
    cosines = released.similarity(x)
    counts = torch.zeros(POOL, dtype=torch.float64)
    for rows in cosines.topk(TOP, -1).indices:
        counts[rows] += 1 / (TOP * len(x))
    together = released(x)[0]
    torch.testing.assert_close(together, merged(released, counts)(x))
    assert not torch.allclose(together[:1], released(x[:1])[0])


@pytest.mark.parametrize("name", ["vit-tiny-32", "small-cnn", "resnet-20"])
def test_a_merged_network_gives_the_adapted_networks_logits(name):
    plain = backbone(name)
    model = adapted(plain, pool=1, top=1)
    x = torch.randn(3, 3, 12, 12, dtype=torch.float64)
    network = merged(model, torch.ones(1, dtype=torch.float64)).eval()
    assert not any(isinstance(m, ScaleAndShift | PooledHead) for m in network.modules())
    torch.testing.assert_close(network(x), model(x))
    assert network.state_dict().keys() - plain.state_dict().keys() == set()


def test_ssf_stands_where_the_authors_put_it():
    layers = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    expected = {"patch_embed.proj", "norm", *(f"blocks.{i}.{layer}" for i in range(4) for layer in layers)}
    assert places(backbone()) == expected
    assert places(backbone("small-cnn")) == {
        "features.0.1", "features.1.1", "features.2.1", "classifier.0.1"
    }  # fmt: skip


# Chen-Mei Feng's code: ViT-B/16 at 224 pixels, P = 25. Counted by hand from its shapes; the full models' sizes too.
SENT = [
    ("vit-base", 10, 5_357_050, 85_806_346, 6.24),
    ("vit-base", 100, 7_087_300, 85_875_556, 8.25),
    ("vit-base", 200, 9_009_800, 85_952_456, 10.48),
    ("vit-tiny", 100, 1_773_700, 5_543_716, 32.0),
]


@pytest.mark.parametrize(("name", "classes", "sent", "full", "percent"), SENT)
def test_parameters_sent(name, classes, sent, full, percent):
    with torch.device("meta"):
        model = build_model(name, classes=classes, shape=(3, 224, 224))
        assert sum(p.numel() for p in model.parameters()) == full
        trained = [p for p in adapt(model, 25, 3).parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == sent
    assert 100 * sent / full == pytest.approx(percent, abs=0.02)


def test_initial_deviations_are_those_of_the_paper_head_by_head():
    torch.manual_seed(0)
    model = adapt(build_model("vit-tiny", classes=50, shape=(3, 32, 32)), 25, 3)
    gamma = torch.cat([m.gamma.flatten() for m in model.modules() if isinstance(m, ScaleAndShift)])
    beta = torch.cat([m.beta.flatten() for m in model.modules() if isinstance(m, ScaleAndShift)])
    assert (gamma.mean().item(), gamma.std().item()) == pytest.approx((1.0, 0.02), abs=1e-3)
    assert (beta.mean().item(), beta.std().item()) == pytest.approx((0.0, 0.02), abs=1e-3)
    assert model.backbone.head.weight.std().item() == pytest.approx((2 / 192) ** 0.5, rel=0.02)
    assert model.keys.std().item() == pytest.approx(0.02, rel=0.05)


SECTIONS = {"fedins": {"ssf-pool": POOL, "ssf-top-k": TOP}, "fedssf": {}}


@pytest.mark.parametrize("model", ["vit-tiny-32", "small-cnn"])
@pytest.mark.parametrize("strategy", SECTIONS)
def test_vmap_agrees_with_the_loop(dataset, strategy, model):
    sections = {
        "algorithm": {"strategy": strategy, **SECTIONS[strategy]},
        "model": {"name": model},
        "training": {"dtype": "float64", "lr": 0.1},
    }
    loop, vmap = (Small(dataset, **sections, simulation={"executor": e}) for e in ("loop", "vmap"))
    agree(loop, vmap, rounds=2, tolerance=1e-8)


@pytest.mark.parametrize("model", ["vit-tiny-32", "small-cnn"])
@pytest.mark.parametrize("executor", ["loop", "vmap"])
def test_the_backbone_is_in_no_message_and_never_changes(dataset, model, executor):
    small = Small(
        dataset,
        algorithm={"strategy": "fedins", **SECTIONS["fedins"]},
        model={"name": model},
        simulation={"executor": executor},
    )
    network = small.federation.pool.worker.task.model
    plain = {n: v for n, v in build(small).state_dict().items() if not n.startswith(("head.", "classifier.1."))}
    before = [v.clone() for v in everything(network) if not v.requires_grad]
    assert sum(v.numel() for v in before) >= sum(v.numel() for v in plain.values())
    order = Order(1, small.federation.shared, fold=False, weighting="uniform")
    sent = {n for n, p in network.named_parameters() if p.requires_grad}
    assert order.shared.keys() == sent
    replies = small.federation.train(order, [0, 1, 2])
    for reply in replies.singles:
        assert reply.shared.keys() == sent
        assert not reply.report
        assert any(not torch.equal(reply.shared[n], order.shared[n]) for n in sent)
    small.run(1)
    small.federation.evaluate(small.federation.shared)
    assert all(torch.equal(a, b) for a, b in zip(before, [v for v in everything(network) if not v.requires_grad]))


def build(small: Small) -> nn.Module:
    return build_model(small.config.model.name, classes=4, shape=(3, 12, 12))


def everything(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def test_the_server_takes_the_plain_mean_whatever_the_clients_hold(dataset):
    small = Small(dataset, algorithm={"strategy": "fedins", **SECTIONS["fedins"]}, model={"name": "vit-tiny-32"})
    state = small.strategy.init(small.federation.shared)
    (order,) = small.strategy.orders(1, state)
    assert order.weighting == "uniform"
    after = small.strategy.aggregate(1, state, order, small.federation.train(order, [0, 1, 2]))
    again = Small(dataset, algorithm={"strategy": "fedins", **SECTIONS["fedins"]}, model={"name": "vit-tiny-32"})
    singles = again.federation.train(Order(1, state, fold=False), [0, 1, 2]).singles
    for name in state:
        mean = sum(r.shared[name].double() for r in singles) / 3
        torch.testing.assert_close(after[name].double(), mean, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"algorithm": {"strategy": "fedbn", "adapters": "ssf"}}, "nothing is left for normalization = 'local'"),
        ({"algorithm": {"strategy": "fedwon", "adapters": "ssf-pool"}}, "standardized-weights"),
        ({"algorithm": {"strategy": "fedins"}, "model": {"norm": "none"}}, "no layer that an adapter could follow"),
        ({"algorithm": {"strategy": "fedssf"}, "model": {"name": "logistic"}}, "no layer that an adapter"),
        ({"algorithm": {"strategy": "fedins", "ssf-pool": 2}}, "expected 1 to ssf-pool = 2"),
        ({"algorithm": {"strategy": "fedins", "matching": 1.5}}, "expected a share from 0 to 1"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(sections, reason):
    def make():
        config, parts = resolve(small_config(**sections))
        return server_of(parts, task_of(config, parts, 4, (3, 12, 12)), config)

    with pytest.raises(ConfigError, match=reason):
        make()


def test_the_pool_composes_with_server_rules_and_rates(dataset):
    algorithm = {"strategy": "fedprox", "adapters": "ssf-pool", "learning-rate": "fedhyper-g", **SECTIONS["fedins"]}
    small = Small(dataset, algorithm=algorithm, model={"name": "vit-tiny-32"})
    before = small.federation.shared
    after = small.run(2)
    assert any(not torch.equal(after[n], before[n]) for n in before)


def test_a_pool_of_one_has_neither_keys_nor_a_second_pass(dataset):
    one, pool = (adapted(backbone(), pool=p, top=1) for p in (1, 2))
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    assert one.keys is None
    assert isinstance(one(x), torch.Tensor)
    assert MATCHING in pool(x)[1]
