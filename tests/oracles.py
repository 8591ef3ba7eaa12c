"""timm as an oracle, imported file by file: its package imports torchvision, which not every torch can load."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from pathlib import Path
from unittest.mock import patch

import pytest


def timm_module(path: str) -> types.ModuleType:
    """``timm_module("layers.std_conv")``; skips the test where timm is not installed."""
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.origin is None:
        pytest.skip("timm is not installed")
    folder, _, name = path.rpartition(".")
    package = f"_timm_{folder}"
    if package not in sys.modules:
        shell = types.ModuleType(package)
        shell.__path__ = [str(Path(spec.origin).parent / folder)]
        sys.modules[package] = shell
    with patch.dict(sys.modules, {"torchvision": None}):  # absent, rather than broken
        return importlib.import_module(f"{package}.{name}")
