"""timm as an oracle, imported file by file: its package imports torchvision, which not every torch can load."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
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


class _Named(type):
    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Empty(types.ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Named(name, (), {})


class _NoTorchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules of torchvision full of empty classes: timm's package names many of them, its ViT uses none."""

    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Empty(spec.name)

    def exec_module(self, module):
        pass


def timm_vits() -> types.ModuleType:
    """timm's ``models.vision_transformer``, which unlike the files above needs the whole package imported."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    finder = _NoTorchvision()
    sys.meta_path.insert(0, finder)
    try:
        _forget_torchvision()
        return importlib.import_module("timm.models.vision_transformer")
    finally:
        sys.meta_path.remove(finder)
        _forget_torchvision()


def _forget_torchvision() -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
