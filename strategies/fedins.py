"""FedIns (Feng et al., "Towards Instance-adaptive Inference for Federated Learning", ICCV 2023, arXiv 2308.06051).

A frozen pre-trained backbone, the same everywhere; the clients train a pool of P small adapters of it (SSF: scale and
shift of features), a key and a classifier for each, and the server takes their plain mean, slot by slot:

    phi_{t+1} = (1 / K) sum_k phi_{k,t},    phi = {gamma_i, beta_i, key_i, classifier_i : i = 1..P}    (not n_k / n)

On every example, in training and at inference, the k adapters whose keys are nearest to the example's feature under the
frozen backbone are averaged (``clients.ssf``; loss in ``clients.adapters``). The slots of different clients keep their
meaning because all start from one initialization. "Federated SSF", the ablation, is a pool of one.

Defaults as in the released code (chunmeifeng/FedIns): P = 25, k = 3, lambda = 0.1. Deviations from it, each a repair:

- Rows are mixed for each example, and the loss is that of the batch. The code of 2023 averaged the rows over the batch
  as well, so that neither training nor test adapted to an instance (``ssf-batch-mean = true`` does that, classifiers
  included); that of 2025 takes images one by one, which is SGD with batch 1. Which of them made the paper's tables is
  not known.
- Classifiers are initialised by Kaiming's rule one by one; the released one takes the pool's tensor as a whole, for
  which the rule finds a fan-in of classes * width.
- The last, smaller batch is trained on (``training.last-batch``); accuracy is that of the last round, not of the best
  one on the test data.
- Models other than ViT have SSF after every normalization layer; the paper has ViT alone.
"""

from __future__ import annotations

from typing import ClassVar

from clients.adapters import Adapters
from fedsim.config import Config
from fedsim.local import ClientTask
from fedsim.registry import Part, preset, register
from fedsim.strategy import Strategy
from strategies.fedavg import FedAvg


class Uniform(FedAvg):
    """The plain mean of the clients, 1 / K each."""

    weighting: ClassVar[str] = "uniform"


class FedIns(Uniform):
    """Args: pool: P. top_k: k. matching: lambda. batch_mean: mix for the batch, as the code of 2023."""

    def __init__(self, pool: int = 25, top_k: int = 3, matching: float = 0.1, batch_mean: bool = False, **options):
        super().__init__(**options)
        self.plugins = (Adapters(pool, top_k, matching, batch_mean),)


def averaging(base: Strategy | None, task: ClientTask) -> Strategy:
    return Uniform(trainable=task.trainable)


@register("rule", "uniform")
def uniform(config: Config) -> Part:
    return Part(server=averaging)


preset("fedins", "frozen backbone, a pool of adapters chosen for each example", rule="uniform", adapters="ssf-pool")
preset("fedssf", "frozen backbone, one adapter for all (FedIns with a pool of one)", rule="uniform", adapters="ssf")
