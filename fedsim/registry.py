"""Finds algorithms by name and puts them together: a server rule and five axes, each a small registered function.

A part is registered by the file that implements it:

    @register("pruning", "fedtiny")
    def fedtiny(config: Config, *, density: float = 0.05) -> Part: ...

Its keyword arguments are its options in ``[algorithm]``. A named algorithm (``strategy = "fedbn"``) is a preset: names
for the rule and the axes, any of which the configuration may override.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedsim.config import Algorithm, Config
from fedsim.errors import ConfigError
from fedsim.local import ClientTask
from fedsim.plugin import Plugin
from fedsim.strategy import Strategy

AXES = ("rule", "normalization", "adapters", "pruning", "learning-rate", "aggregation")
DEFAULTS = {
    "rule": "fedavg",
    "normalization": "shared",
    "adapters": "none",
    "pruning": "none",
    "learning-rate": "constant",
    "aggregation": "mean",
}
PACKAGES = ("clients", "strategies")


@dataclass(frozen=True)
class Part:
    """One value of an axis.

    Attributes:
        plugins: its client half.
        server: its server half: ``(base, task) -> strategy``; the rule's gets None as base, the others wrap it.
        check: ``(task, config) -> reason`` why this part makes no sense here, or None.
    """

    plugins: tuple[Plugin, ...] = ()
    server: Callable[[Strategy | None, ClientTask], Strategy] | None = None
    check: Callable[[ClientTask, Config], str | None] | None = None


Builder = Callable[..., Part]


def nothing_shared(task: ClientTask, config: Config) -> str | None:
    """A ``check`` of parts that work on the mean update of the clients."""
    if set(task.trainable) - task.private:
        return None
    return f"strategy '{config.algorithm.strategy}' shares nothing, so there is no update for it to work on"


@dataclass(frozen=True)
class Preset:
    """What a strategy's name stands for: parts of the axes, and configuration it implies by section."""

    summary: str
    parts: Mapping[str, str] = field(default_factory=dict)
    implies: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


_parts: dict[str, dict[str, Builder]] = {axis: {} for axis in AXES}
_presets: dict[str, Preset] = {}


def register(axis: str, name: str) -> Callable[[Builder], Builder]:
    def put(builder: Builder) -> Builder:
        _parts[axis][name] = builder
        return builder

    return put


def _neutral(config: Config) -> Part:
    return Part()


for _axis in AXES[1:]:
    register(_axis, DEFAULTS[_axis])(_neutral)


def preset(name: str, summary: str, implies: Mapping[str, Mapping[str, Any]] | None = None, **parts: str) -> None:
    """``preset("fedbn", "...", normalization="local")``; ``learning_rate`` names the axis ``learning-rate``."""
    named = {axis.replace("_", "-"): value for axis, value in parts.items()}
    _presets[name] = Preset(summary, named, implies or {})


def load() -> None:
    """Import the packages whose modules register themselves."""
    for package in PACKAGES:
        importlib.import_module(package)


def presets() -> dict[str, Preset]:
    load()
    return dict(sorted(_presets.items()))


def parts(axis: str) -> dict[str, Builder]:
    load()
    return dict(sorted(_parts[axis].items()))


def options_of(builder: Builder) -> dict[str, Any]:
    """Option names and defaults of a part, from its signature."""
    signature = inspect.signature(builder)
    return {p.name: p.default for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY}


def _pick(what: str, name: str, known: Iterable[str]) -> str:
    known = list(known)
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
    raise ConfigError(f"algorithm.{what} = '{name}': no such {what}; {hint}")


def _names(algorithm: Algorithm) -> dict[str, str]:
    """Axis -> value of what an ``[algorithm]`` table asks for."""
    load()
    chosen = _presets[_pick("strategy", algorithm.strategy, _presets)]
    names = {**DEFAULTS, **chosen.parts}
    for axis in AXES[1:]:
        wanted = getattr(algorithm, axis.replace("-", "_"))
        if wanted:
            names[axis] = _pick(axis, wanted, _parts[axis])
    return names


def relevant_options(algorithm: Algorithm) -> set[str]:
    """The options, spelled as in a configuration, that the chosen parts have."""
    names = _names(algorithm)
    return {k.replace("_", "-") for axis in AXES for k in options_of(_parts[axis][names[axis]])}


def _typed(key: str, value: Any, default: Any) -> Any:
    """The option's value in the type of its default."""
    kind = type(default)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise ConfigError(
            f"algorithm.{key.replace('_', '-')} = {value!r}: expected {kind.__name__}, as the default {default!r}"
        )
    return value


def resolve(config: Config) -> tuple[Config, dict[str, Part]]:
    """The parts a configuration asks for, and the configuration with every name and option written out.

    Raises:
        ConfigError: an unknown strategy, axis value or option, or an option of the wrong type.
    """
    algorithm = config.algorithm
    names, chosen = _names(algorithm), _presets[algorithm.strategy]
    builders = {axis: _parts[axis][names[axis]] for axis in AXES}
    known = {key: default for builder in builders.values() for key, default in options_of(builder).items()}
    unknown = [key for key in algorithm.options if key not in known]
    if unknown:
        key = unknown[0].replace("_", "-")
        spelled = [k.replace("_", "-") for k in known]
        near = difflib.get_close_matches(key, spelled, 1)
        hint = f"did you mean '{near[0]}'?" if near else f"its options: {', '.join(spelled) or 'none'}"
        raise ConfigError(f"algorithm.{key}: no option of {algorithm.strategy} ({_spell(names)}); {hint}")
    options = {k: _typed(k, algorithm.options.get(k, d), d) for k, d in known.items()}
    updates: dict[str, Any] = {
        section: getattr(config, section).model_copy(update=dict(values)) for section, values in chosen.implies.items()
    }
    full = {**{a.replace("-", "_"): names[a] for a in AXES[1:]}, **options}
    updates["algorithm"] = Algorithm.model_validate({"strategy": algorithm.strategy, **_kebab(full)})
    config = config.model_copy(update=updates)
    built = {axis: b(config, **{k: options[k] for k in options_of(b)}) for axis, b in builders.items()}
    return config, built


def _kebab(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k.replace("_", "-"): v for k, v in values.items()}


def _spell(names: Mapping[str, str]) -> str:
    return ", ".join(f"{axis} '{name}'" for axis, name in names.items())


def plugins_of(parts: Mapping[str, Part]) -> tuple[Plugin, ...]:
    """The client half. Pruning comes first, so that clipping and rates see the gradients of what is trained."""
    order = ("pruning", *(axis for axis in AXES if axis != "pruning"))
    return tuple(plugin for axis in order for plugin in parts[axis].plugins)


def server_of(parts: Mapping[str, Part], task: ClientTask, config: Config) -> Strategy:
    """The server half: the rule, wrapped by the learning rate, then by pruning (which must see the final weights), then
    by the aggregation (what they all take for the clients' replies).

    Raises:
        ConfigError: a part makes no sense with this model or configuration.
    """
    for axis, part in parts.items():
        reason = part.check(task, config) if part.check else None
        if reason:
            raise ConfigError(f"algorithm.{axis}: {reason}")
    strategy: Strategy | None = None
    for axis in ("rule", "normalization", "adapters", "learning-rate", "pruning", "aggregation"):
        server = parts[axis].server
        if server is not None:
            strategy = server(strategy, task)
    assert strategy is not None, "every rule has a server half"
    return strategy
