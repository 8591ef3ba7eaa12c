"""What is written twice must agree: Flower's list of keys, the package's data, the rule about pickles."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fedsim.config import Config, kebab
from fedsim.data.digits.sources import PACK
from fedsim.recipes import quick_recipe
from fedsim.registry import AXES, options_of, parts

ROOT = Path(__file__).parents[1]


def test_flower_may_override_every_key_and_starts_from_our_defaults():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    expected = Config().as_dict()
    for axis in AXES:
        for builder in parts(axis).values():
            expected["algorithm"] |= {kebab(k): v for k, v in options_of(builder).items()}
    assert listed == expected


def test_the_pack_and_the_recipes_are_there():
    assert {p.name for p in PACK.iterdir()} >= {
        "mnist5k.npz",
        "mfeat.npz",
        "optdigits.npz",
        "digit_fonts.zip",
        "README.md",
    }
    assert all(path.exists() for path in quick_recipe())


def test_nothing_unpickles_but_the_restricted_reader():
    suspicious = re.compile(
        r"^\s*(import|from) (cloud|ray\.cloud)?(pickle|marshal|shelve|dill|joblib)|\bcloudpickle\b|read_pickle"
        r"|allow_pickle=True|torch\.(jit\.|hub\.)?load\(|torch\.package|weights_only=False|\bnp\.load\((?!.*allow_pickle=False)",
        re.M,
    )
    found = {
        str(path.relative_to(ROOT))
        for package in ("fedsim", "strategies", "clients")
        for path in (ROOT / package).rglob("*.py")
        if suspicious.search(path.read_text())
    }
    assert found == {"fedsim/data/pickles.py"}


def test_the_lock_pins_every_dependency_with_its_hash():
    lines = (ROOT / "requirements.lock").read_text().splitlines()[1:]
    matches = [re.fullmatch(r"([\w.-]+)==(\S+) --hash=sha256:[0-9a-f]{64}", line) for line in lines]
    assert all(matches), "a line is NAME==VERSION --hash=sha256:DIGEST"
    locked = {canonicalize_name(m[1]): m[2] for m in matches}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in project["dependencies"]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(locked[canonicalize_name(wanted.name)]), f"{text}: run .ci/lock.py anew"
