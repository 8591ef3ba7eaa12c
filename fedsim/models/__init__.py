"""The model zoo: networks by the names that the field uses, each with any of the normalization layers."""

from fedsim.models import fedbn, small  # noqa: F401 (they register their models)
from fedsim.models.registry import build_model, model_names, register

__all__ = ["build_model", "model_names", "register"]
