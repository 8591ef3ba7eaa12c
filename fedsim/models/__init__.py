"""Models by name. A model is a plain function, registered in the file of its family:

    @register("digits-cnn")
    def digits_cnn(classes: int, shape: tuple[int, ...], norm: str) -> nn.Module: ...

Its keyword-only arguments are its options. Weights are torch's default initialization, drawn from torch's generator
as the caller has seeded it.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable

from torch import nn

from fedsim.errors import ConfigError

Builder = Callable[..., nn.Module]
_models: dict[str, Builder] = {}


def register(name: str) -> Callable[[Builder], Builder]:
    def put(builder: Builder) -> Builder:
        _models[name] = builder
        return builder

    return put


def model_names() -> list[str]:
    return sorted(_models)


def build_model(name: str, *, classes: int, shape: tuple[int, ...], norm: str = "bn", **options) -> nn.Module:
    """The model ``name`` for inputs of ``shape`` (without the batch) and logits [B, classes].

    Raises:
        ConfigError: unknown name, option or norm, or a shape the model cannot take.
    """
    if name not in _models:
        raise ConfigError(f"model.name = '{name}': no such model; {_hint(name, _models)}")
    builder = _models[name]
    known = [p.name for p in inspect.signature(builder).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for key in options:
        if key not in known:
            raise ConfigError(f"model.{key}: no option of {name}; {_hint(key, known)}")
    return builder(classes, tuple(shape), norm, **options)


def _hint(name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known) or 'none'}"


def image_shape(shape: tuple[int, ...], least: int) -> tuple[int, int, int]:
    """(C, H, W) for a model that takes images of at least ``least`` x ``least`` pixels."""
    if len(shape) != 3 or min(shape[1:]) < least:
        found = "x".join(map(str, shape))
        raise ConfigError(f"model.name: takes images of {least}x{least} pixels or more, the data are {found}")
    return shape  # type: ignore[return-value]


from fedsim.models import (  # noqa: E402 (they register their models)
    alexnet,  # noqa: F401
    cnn,  # noqa: F401
    linear,  # noqa: F401
    lstm,  # noqa: F401
    mobilenet,  # noqa: F401
    resnet,  # noqa: F401
    vgg,  # noqa: F401
    vit,  # noqa: F401
)
