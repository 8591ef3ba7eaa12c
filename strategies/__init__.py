"""Server halves: one algorithm a file, the paper in its header. Every class is a Flower ``Strategy``."""

from strategies.baselines import Centralised, LocalOnly
from strategies.fedavg import FedAvg
from strategies.fedbn import FedBN, FixBN, SiloBN
from strategies.fedhyper import FedHyper
from strategies.fedopt import FedOpt
from strategies.fedprox import FedProx
from strategies.fedwon import FedWon

__all__ = ["Centralised", "FedAvg", "FedBN", "FedHyper", "FedOpt", "FedProx", "FedWon", "FixBN", "LocalOnly", "SiloBN"]
