"""FedProx (Li et al., MLSys 2020): FedAvg whose clients minimise F_k(w) + (mu / 2) ||w - w_t||^2.

The server half is FedAvg's; the term is ``clients.proximal.Proximal``. mu = 0.01 on the digits is FedBN's setting.
"""

from __future__ import annotations

from clients.proximal import Proximal
from fedsim.config import Config
from fedsim.registry import Part, preset, register
from strategies.fedavg import FedAvg, averaging


class FedProx(FedAvg):
    def __init__(self, mu: float = 0.01, **options):
        super().__init__(**options)
        self.plugins = (Proximal(mu),)


@register("rule", "fedprox")
def fedprox(config: Config, *, mu: float = 0.01) -> Part:
    return Part((Proximal(mu),), server=averaging)


preset("fedprox", "FedAvg with a proximal term on every client", rule="fedprox")
