"""The configuration: one TOML file of scalars, every key with a default, all errors reported at once.

Keys are kebab-case as in Flower. Options of an algorithm (``mu``, ``density``, ...) live in ``[algorithm]`` beside
the names of its parts; they are checked by ``fedsim.registry`` against the signatures of the parts chosen.
"""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedsim.errors import ConfigError

Scalar = bool | int | float | str
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
MOST_THREADS = 1024


def kebab(name: str) -> str:
    return name.replace("_", "-")


class Section(BaseModel):
    model_config = ConfigDict(alias_generator=kebab, populate_by_name=True, extra="forbid", frozen=True)


class Federation(Section):
    dataset: str = "digits"
    root: str = Field("", description="folder or file of your own copy of the data set; empty for the built-in suite")
    image_size: Annotated[int, Field(ge=0)] = Field(0, description="pixels a side of your own images; 0: the default")
    domains: str = Field("", description="comma-separated; empty: all domains of the data set")
    leave_out: str = Field("", description="a domain that no client holds; scored as unseen")
    clients_per_domain: Count = 1
    partition: Literal["iid", "dirichlet", "shards", "quantity", "natural", "pooled"] = "iid"
    across: bool = Field(False, description="partition the union of the domains, so that clients mix domains")
    alpha: Positive = Field(0.5, description="Dirichlet concentration over labels")
    classes_per_client: Count = 2
    power: Positive = Field(1.5, description="exponent of the quantity skew")
    min_examples: Count = 1
    examples_per_client: Annotated[int, Field(ge=0)] = Field(0, description="at most so many; 0: all")
    public_per_class: Annotated[int, Field(ge=0)] = Field(
        0, description="training examples of each class that the server holds instead of the clients"
    )
    validation: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="share of every shard held out")
    participation: Annotated[float, Field(gt=0, le=1)] = 1.0
    clients_per_round: Annotated[int, Field(ge=0)] = Field(0, description="overrides participation if not 0")


class Model(Section):
    name: str = "small-cnn"
    norm: Literal["bn", "gn", "ln", "none"] = "bn"
    weights: str = Field("", description="safetensors file of initial weights; empty: drawn from the seed")


class Training(Section):
    epochs: Count = 1
    steps: Annotated[int, Field(ge=0)] = Field(0, description="local steps a round instead of epochs, if not 0")
    batch_size: Count = 32
    shuffle: bool = Field(True, description="anew for every epoch; false: the order of the shard")
    last_batch: Literal["keep", "drop"] = "keep"
    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: NonNegative = 0.01
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: NonNegative = 0.0
    schedule: Literal["constant", "exponential", "step", "cosine"] = "constant"
    decay: Annotated[float, Field(gt=0, le=1)] = Field(0.995, description="factor of exponential and step")
    decay_every: Count = 10
    augment: str = "none"
    pretrain_epochs: Annotated[int, Field(ge=0)] = Field(0, description="on the server's public examples, first of all")
    dtype: Literal["float32", "float64"] = Field("float32", description="float64: to tell rounding from mistakes")
    precision: Literal["full", "tf32", "bf16"] = Field(
        "full", description="of products and convolutions while training; bf16: autocast, weights stay as they are"
    )


class Algorithm(BaseModel):
    """The five axes and the server rule; other keys are options of the parts chosen."""

    model_config = ConfigDict(alias_generator=kebab, populate_by_name=True, extra="allow", frozen=True)
    __pydantic_extra__: dict[str, Scalar]

    strategy: str = "fedavg"
    normalization: str = ""
    adapters: str = ""
    pruning: str = ""
    learning_rate: str = ""
    aggregation: str = ""

    @property
    def options(self) -> dict[str, Scalar]:
        return {k.replace("-", "_"): v for k, v in (self.__pydantic_extra__ or {}).items()}


class SimulationSection(Section):
    executor: Literal["auto", "loop", "vmap"] = "auto"
    workers: Annotated[int, Field(ge=0, le=1024)] = 2
    block: Annotated[int, Field(ge=0)] = Field(0, description="clients a block; 0: by rule on cohort and model")
    threads: Annotated[int, Field(ge=1, le=MOST_THREADS)] = Field(
        1, description="torch's threads of a worker; sums over them have other bits"
    )
    odd_block_threads: Annotated[int, Field(ge=0, le=MOST_THREADS)] = Field(
        0, description="threads for the last of an odd number of blocks, beside which a worker is idle; 0: by rule"
    )
    compile: bool = Field(False, description="vmap: steps through torch's compiler, for runs longer than its minute")
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0.0
    address: str = Field("", description="address of a running Ray cluster; empty: start one here")
    retries: Annotated[int, Field(ge=0)] = Field(2, description="of a block whose worker died or took too long")
    time_limit: NonNegative = Field(
        0.0, description="seconds a client may train, or a model be scored on a split; 0: no limit"
    )


class Evaluation(Section):
    every: Count = 1
    batch_size: Count = 250
    modes: str = Field("", description="comma-separated evaluation modes, scored beside the ordinary evaluation")
    modes_every: Annotated[int, Field(ge=0)] = Field(
        0, description="of the evaluated rounds, multiples of it; 0: the last alone"
    )
    alpha: Annotated[float, Field(ge=0, le=1)] = Field(0.1, description="weight of the test batch in alpha-bn")
    components: Count = Field(16, description="components of unmix-tns")
    never_sampled: Literal["initial", "mean"] = Field(
        "initial", description="in the modes, the private tensors of a client that has never trained"
    )


class Checkpoint(Section):
    every: Count = 10
    keep: Count = 2


class Guard(Section):
    max_update_norm: NonNegative = Field(0.0, description="an update of a larger L2 norm is refused; 0: no bound")
    quorum: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="share of a round's clients whose updates must be accepted, or the model stays as it is"
    )
    set_aside_after: Annotated[int, Field(ge=0)] = Field(
        0, description="refused updates after which a client is not asked any more; 0: never"
    )


def _file_name(name: str) -> str:
    if not name or len(name) > 100 or name.startswith(".") or not name.isprintable() or "/" in name:
        raise ValueError("expected a name that a folder can have: no '/', no '.' in front, at most 100 characters")
    return name


class Config(Section):
    name: Annotated[str, AfterValidator(_file_name)] = "fedsim"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    rounds: Count = 100
    federation: Federation = Federation()
    model: Model = Model()
    training: Training = Training()
    algorithm: Algorithm = Field(default_factory=lambda: Algorithm.model_validate({}))
    simulation: SimulationSection = SimulationSection()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    guard: Guard = Guard()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.training.momentum and self.training.optimizer == "adam":
            raise ValueError("training.momentum belongs to optimizer = 'sgd'; Adam has its own (remove the key)")
        if self.training.pretrain_epochs and not self.federation.public_per_class:
            raise ValueError("training.pretrain-epochs needs examples: set federation.public-per-class too")
        return self

    def as_dict(self) -> dict[str, Any]:
        return self.model_dump(by_alias=True)


def _known_keys(where: tuple[str | int, ...]) -> list[str]:
    section: Any = Config
    for key in where:
        field = next((f for n, f in section.model_fields.items() if kebab(n) == key), None)
        section = getattr(field, "annotation", None)
        if section is None or not hasattr(section, "model_fields"):
            return []
    return [kebab(n) for n in section.model_fields]


def _explain(error: Any) -> str:
    where, key = tuple(error["loc"]), ".".join(str(p) for p in error["loc"])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(where[-1]), _known_keys(where[:-1]), 1)
        known = ", ".join(_known_keys(where[:-1]))
        return f"{key}: no such key" + (f"; did you mean '{near[0]}'?" if near else f"; known: {known}")
    message = error["msg"].removeprefix("Value error, ")
    return f"{key}: {message}, found {error['input']!r}" if key else message


def parse_config(values: dict[str, Any], source: str = "configuration") -> Config:
    """Build a configuration from nested tables.

    Raises:
        ConfigError: one message that lists every bad key with what was expected and found.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = [_explain(e) for e in error.errors()]
        raise ConfigError(f"{source}: " + "\n  ".join(["the configuration is not valid:", *lines])) from None


def _parse_value(text: str) -> Scalar:
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text  # an unquoted string, as a shell user types it
    return value if isinstance(value, bool | int | float | str) else text


def apply_overrides(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """``["training.lr=0.1", ...]`` on top of nested tables; values are TOML scalars or bare strings."""
    for item in overrides:
        path, equals, text = item.partition("=")
        if not equals or not path.strip():
            raise ConfigError(f"--set {item}: expected KEY=VALUE, for example training.lr=0.1")
        *tables, key = path.strip().split(".")
        target = values
        for table in tables:
            target = target.setdefault(table, {})
            if not isinstance(target, dict):
                raise ConfigError(f"--set {item}: '{table}' is a value, not a table")
        target[key] = _parse_value(text.strip())
    return values


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a TOML file and apply overrides.

    Raises:
        ConfigError: the file is missing, is not TOML, or has bad keys.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a configuration file: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    return parse_config(apply_overrides(values, overrides or []), str(path))


def to_toml(config: Config) -> str:
    """The resolved configuration as a TOML file that runs again as it is."""
    values = config.as_dict()
    lines = [f"{k} = {toml_value(v)}" for k, v in values.items() if not isinstance(v, dict)]
    for table, entries in values.items():
        if isinstance(entries, dict):
            lines += ["", f"[{table}]"] + [f"{k} = {toml_value(v)}" for k, v in entries.items()]
    return "\n".join(lines) + "\n"


def toml_value(value: Scalar) -> str:
    """A scalar as TOML spells it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        return f'"{escaped}"'
    return repr(value)
