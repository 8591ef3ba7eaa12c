"""Server halves: one algorithm a file, the paper in its header. Every class is a Flower ``Strategy``."""

from strategies.baselines import Centralised, LocalOnly
from strategies.ditto import Ditto
from strategies.fedavg import FedAvg
from strategies.fedbn import FedBN, FixBN, SiloBN
from strategies.feddyn import FedDyn
from strategies.fedhyper import FedHyper
from strategies.fedins import FedIns
from strategies.fednova import FedNova
from strategies.fedopt import FedOpt
from strategies.fedprox import FedProx
from strategies.fedtiny import FedTiny
from strategies.fedwon import FedWon
from strategies.personal import FedBABU, FedPer, FedRep
from strategies.pooled_statistics import PooledStatistics
from strategies.prunefl import FedDST, PruneFL
from strategies.robust import Robust
from strategies.scaffold import Scaffold
from strategies.server_rate import FedExP, ServerRate
from strategies.static_pruning import StaticPruning

__all__ = [
    "Centralised",
    "Ditto",
    "FedAvg",
    "FedBABU",
    "FedBN",
    "FedDST",
    "FedDyn",
    "FedExP",
    "FedHyper",
    "FedIns",
    "FedNova",
    "FedOpt",
    "FedPer",
    "FedProx",
    "FedRep",
    "FedTiny",
    "FedWon",
    "FixBN",
    "LocalOnly",
    "PooledStatistics",
    "PruneFL",
    "Robust",
    "Scaffold",
    "ServerRate",
    "SiloBN",
    "StaticPruning",
]
