"""Ditto (Li, Hu, Beirami, Smith, "Ditto: Fair and Robust Federated Learning Through Personalization", ICML 2021):
FedAvg learns w, and every client a model of its own that stays near it,

    v_k <- v_k - eta (grad F_k(v_k) + lambda (v_k - w_t))

The server half is FedAvg's and never sees v_k; both models step on the same batches, as in the authors' code. The
client half is ``clients.personal.PersonalTwin``: each client is evaluated with v_k. A client that was never sampled
has the initial weights. Deviation: lambda is the same for all clients (the authors may choose it on validation data).
"""

from __future__ import annotations

from clients.personal import PersonalTwin
from fedsim.config import Config
from fedsim.registry import Part, preset, register
from strategies.fedavg import FedAvg, averaging


class Ditto(FedAvg):
    """Args: strength: lambda. Its clients' models hold two copies: ``shared.*`` and ``personal.*``."""

    def __init__(self, strength: float = 0.1, **options):
        super().__init__(**options)
        self.plugins = (PersonalTwin(strength),)


@register("rule", "ditto")
def ditto(config: Config, *, ditto_lambda: float = 0.1) -> Part:
    return Part((PersonalTwin(ditto_lambda),), server=averaging)


preset("ditto", "a personal model near the global one", rule="ditto")
