"""fedsim: federated-learning simulation for multi-domain data."""

__version__ = "0.1.0"
