"""fedsim: federated-learning simulation for multi-domain data."""

from fedsim.processes import spin_briefly

__version__ = "0.1.0"

spin_briefly()  # here, because torch must not be there yet
