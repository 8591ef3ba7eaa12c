"""Configuration: defaults, round trip, and errors that say what to mend."""

import tomllib

import pytest

from fedsim.config import Config, apply_overrides, load_config, parse_config, to_toml
from fedsim.errors import ConfigError
from fedsim.registry import resolve


def test_round_trip_of_the_resolved_configuration():
    config, _ = resolve(parse_config({"name": 'quo"ted', "algorithm": {"strategy": "fedprox", "mu": 0.1}}))
    again, _ = resolve(parse_config(tomllib.loads(to_toml(config))))
    assert again == config
    assert again.algorithm.options["mu"] == 0.1


def test_all_errors_at_once_with_place_expectation_and_finding():
    bad = {"round": 3, "training": {"lr": -1, "batch-sise": 2}, "simulation": {"executor": "fast"}}
    with pytest.raises(ConfigError) as caught:
        parse_config(bad, "my.toml")
    message = str(caught.value)
    assert message.startswith("my.toml")
    for part in ("did you mean 'rounds'", "did you mean 'batch-size'", "training.lr", "found -1", "'loop'"):
        assert part in message


@pytest.mark.parametrize("key", ["threads", "odd-block-threads"])
def test_torch_is_not_asked_for_threads_beyond_what_it_counts(key):
    with pytest.raises(ConfigError, match=rf"simulation\.{key}.*1024.*found 3000000000"):
        parse_config({"simulation": {key: 3_000_000_000}})


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        ({"strategy": "fedbm"}, "did you mean 'fedbn'"),
        ({"normalization": "locale"}, "did you mean 'local'"),
        ({"strategy": "fedprox", "mo": 0.1}, "its options: mu"),
        ({"strategy": "fedprox", "mu": "big"}, "expected float"),
        ({"strategy": "fedavg", "mu": 0.1}, "no option of fedavg"),
    ],
)
def test_algorithm_errors(algorithm, expected):
    with pytest.raises(ConfigError, match=expected):
        resolve(parse_config({"algorithm": algorithm}))


def test_overrides_are_toml_scalars_or_bare_strings():
    values = apply_overrides({}, ["training.lr=0.5", "name=hello", "federation.across=true", "rounds = 7"])
    config = parse_config(values)
    assert (config.training.lr, config.name, config.federation.across, config.rounds) == (0.5, "hello", True, 7)
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        apply_overrides({}, ["rounds"])


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "no such configuration file"), (b"rounds = = 3", "not valid TOML"), (b"\xff\xfe", "cannot be read")],
)
def test_files_that_cannot_be_read(tmp_path, content, expected):
    path = tmp_path / "c.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=expected):
        load_config(path)


def test_every_key_has_a_default():
    assert Config() == parse_config({})
