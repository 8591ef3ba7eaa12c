"""Every model with every strategy and every normalization under both executors: three rounds of loop and vmap agree.

In float64, so that a mistake cannot hide behind rounding: with batches of four, BatchNorm amplifies a difference
about a thousandfold each round (MobileNetV2: 1e-13, 2e-10, 7e-7). ``test_engine`` has one in float32.
"""

import copy

import pytest
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn

from fedsim.data import Dataset
from fedsim.errors import ConfigError
from fedsim.evaluation import mode_batches
from fedsim.registry import parts, presets
from tests.conftest import IMAGE_MODELS, Small, shards_of, small_dataset
from tests.test_engine import agree

SHAPES = {
    "alexnet": (3, 64, 64),
    "digits-cnn": (3, 16, 16),
    "lenet": (3, 16, 16),
    "vgg-11": (3, 16, 16),
    "vit-tiny": (3, 16, 16),
}
STRATEGIES = [name for name in presets() if name != "centralised"]
PRESET = {p.parts.get("normalization", "shared") for p in presets().values()}
VARIANTS = [name for name in parts("normalization") if name not in PRESET]  # of no strategy of their own


@pytest.fixture(scope="session")
def datasets(tmp_path_factory) -> dict[tuple[int, ...], Dataset]:
    root = tmp_path_factory.mktemp("shapes")
    return {s: small_dataset(root / "x".join(map(str, s)), shape=s) for s in {(3, 12, 12), *SHAPES.values()}}


def both(datasets, model: str, strategy: str, **algorithm: str) -> tuple[Small, Small]:
    dataset = datasets[SHAPES.get(model, (3, 12, 12))]
    # two ragged clients, two steps each; one step of the 57 million parameters is enough
    robust = presets()[strategy].parts.get("aggregation")
    shards = shards_of(dataset, (4, 3) if model == "alexnet" else (8, 7, 8) if robust else (8, 7))
    options: dict[str, float | str] = {**algorithm, **({"byzantine": 0} if robust else {})}
    if strategy == "fedtiny":
        options["dev-fraction"] = 1.0  # of shards as small as these, lest BatchNorm see one example
    # MobileNetV2's last feature maps are a single pixel here: four of them would be rounding to BatchNorm.
    batch = 8 if model == "mobilenet-v2" else 4
    sections = {
        "model": {"name": model},
        "algorithm": {"strategy": strategy, **options},
        "federation": {"public-per-class": 1},  # for methods that score weights on the server
        "training": {"batch-size": batch, "lr": 0.01, "dtype": "float64"},
    }
    loop, vmap = (Small(dataset, shards, simulation={"executor": e}, **sections) for e in ("loop", "vmap"))
    return loop, vmap


@pytest.mark.parametrize("model", [m for m in IMAGE_MODELS if m != "alexnet"])
def test_vmap_agrees_with_the_loop_on_every_model(datasets, model):
    agree(*both(datasets, model, "fedavg"), rounds=1, tolerance=1e-9)
    agree(*both(datasets, model, "fedavg"))


# One of each kind for four models: AlexNet's 57 million parameters take a minute a strategy and these of VGG-11 and
# ResNet-18 ten seconds; MobileNetV2's last feature maps are a single pixel here, so that BatchNorm's few values fall on
# either side of ReLU6's kink by rounding alone.
SOME = {
    "alexnet": ("fedbn", "fedwon", "fedtiny"),
    "mobilenet-v2": ("fedavg", "fedbn", "fedprox", "fednova"),
    "resnet-18": ("fedavg", "fedbn", "fedwon", "fedtiny", "fedhyper-g-cl"),
    "vgg-11": ("fedavg", "fedbn", "fedwon", "fedtiny", "fedhyper-g-cl"),
}
PAIRS = [(m, s) for m in IMAGE_MODELS for s in STRATEGIES if s in SOME.get(m, STRATEGIES)]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "strategy"), PAIRS)
def test_vmap_agrees_with_the_loop_on_every_model_and_strategy(datasets, model, strategy):
    reason = senseless(model, strategy)
    if reason:
        with pytest.raises(ConfigError, match=reason):
            both(datasets, model, strategy)
        return
    agree(*both(datasets, model, strategy))


# VGG-11's last feature maps are a single pixel here, which InstanceNorm cannot normalize.
SOME_VARIANTS = {
    "alexnet": (),
    "mobilenet-v2": ("in", "bcn-estimated"),
    "resnet-18": ("ibn-a", "adab2n"),
    "vgg-11": ("evonorm-s0", "evonorm-b0", "ghost"),
}


@pytest.mark.parametrize(
    ("model", "variant"),
    [
        pytest.param(m, v, marks=[] if m == "small-cnn" else pytest.mark.slow)
        for m in IMAGE_MODELS
        for v in VARIANTS
        if v in SOME_VARIANTS.get(m, VARIANTS)
    ],
)
def test_vmap_agrees_with_the_loop_on_every_model_and_normalization(datasets, model, variant):
    reason = senseless_normalization(model, variant)
    if reason:
        with pytest.raises(ConfigError, match=reason):
            both(datasets, model, "fedavg", normalization=variant)
        return
    # MobileNetV2: see SOME; what disagrees at all disagrees in the first round.
    several = {"rounds": 3} if model != "mobilenet-v2" else {"rounds": 1, "tolerance": 1e-9}
    agree(*both(datasets, model, "fedavg", normalization=variant), **several)


HEAVY = ("mobilenet-v2", "resnet-18", "vgg-11")
BATCH_NORM_MODELS = [m for m in IMAGE_MODELS if m not in ("alexnet", "logistic", *HEAVY) and "vit" not in m]


@pytest.mark.parametrize("model", [*BATCH_NORM_MODELS, *(pytest.param(m, marks=pytest.mark.slow) for m in HEAVY)])
def test_evaluation_modes_run_on_every_model(datasets, model):
    modes = "own,mean,pooled,reestimated,adabn,test-batch,alpha-bn,unmix-tns"
    dataset = datasets[SHAPES.get(model, (3, 12, 12))]
    sections = {"model": {"name": model}, "algorithm": {"strategy": "fedbn"}}
    small = Small(dataset, shards_of(dataset, (8, 7)), evaluation={"modes": modes, "batch-size": 8}, **sections)
    federation = small.federation
    found = {m: federation.evaluate_mode(federation.shared, m) for m in small.spec.modes}
    assert all([s.client for s in scores] == [0, 1] for scores in found.values())
    oracle = copy.deepcopy(small.task.model)
    indices = mode_batches(dataset.slice(dataset.domains[1], "test"), 8, small.config.seed)
    batches = [federation.pool.worker.examples.batch("test", i) for i in indices]
    oracle.load_state_dict({**federation.shared, **federation.private})
    update_bn([x for x, _ in batches], oracle)
    loss = sum(F.cross_entropy(oracle.eval()(x).detach(), y, reduction="sum") for x, y in batches)
    assert found["adabn"][1].loss == pytest.approx(float(loss), rel=1e-4)


def senseless(model: str, strategy: str) -> str:
    """Why a model and a strategy do not go together, or nothing."""
    pruning = presets()[strategy].parts.get("pruning")
    if model == "logistic" and pruning:
        return "nothing to prune"
    if model == "logistic" and strategy in ("fedper", "fedrep", "fedbabu"):
        return "has no body and head"
    needs_statistics = strategy in ("silobn", "fixbn")
    if strategy == "fbn":
        return senseless_normalization(model, "pooled-statistics")
    needs_norms = needs_statistics or strategy in ("fedbn", "fedins", "fedssf")
    if (model == "logistic" and needs_norms) or (model.startswith("vit") and needs_statistics):
        return "has no"
    return ""


def senseless_normalization(model: str, variant: str) -> str:
    if variant == "affine-only":
        return "no layer has gamma and beta" if model == "logistic" else ""
    if model == "logistic" or model.startswith("vit"):
        return "the model has none"
    if variant.startswith("evonorm") and model in ("mobilenet-v2", "resnet-18", "resnet-20"):
        return "no ReLU follows"
    return ""
