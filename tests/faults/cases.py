"""The bad inputs: what is spoiled, the command, and what its one message must say."""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import pickle
import shutil
import sqlite3
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from tests.faults.forked import fedsim_command
from tests.faults.place import Place, cut, flip, folder_for, full_disk, read_only

Arrange = Callable[[Place], Any]
RUN = "run {config} --out {out}"
SET = RUN + " --set "
RESUME = "resume {run}"


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        words: the command after ``fedsim``; names in braces are paths of the ``Place``.
        says: parts of the message: the file or key it names, and what was expected or how to mend it.
        arrange: spoils the place.
        under_way: the run goes on until it meets the damage, and is left so that it can go on.
        before: called in the command's own process (mounts, locks), with ``extra`` made of the place.
    """

    area: str
    name: str
    words: str
    says: tuple[str, str]
    arrange: Arrange = lambda place: None
    code: int = 2
    under_way: bool = False
    before: Callable[..., None] | None = None
    extra: Callable[[Place], tuple[Any, ...]] = lambda place: ()


CASES: list[Case] = []


def case(area: str, name: str, words: str, where: str, mend: str, *steps: Arrange, **options: Any) -> None:
    def arrange(place: Place) -> None:
        for step in steps:
            step(place)

    CASES.append(Case(area, name, words, (where, mend), arrange, **options))


def write(name: str, content: str | bytes) -> Arrange:
    """A step that writes a file of the place."""

    def step(place: Place) -> None:
        path = place.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return step


def on(name: str, act: Callable[[Path], Any]) -> Arrange:
    """A step that does something to a file of the place."""
    return lambda place: act(place.root / name)


LINE = "command line"
case(LINE, "an unknown command", "simulate {config}", "'simulate'", "--help")
case(LINE, "an unknown option", "run {config} --rounds 3", "'--rounds'", "--help")
case(LINE, "no argument where one is needed", "table", "'RUN...'", "--help")
case(LINE, "a word for a number", RUN + " --workers many", "'--workers'", "not a valid integer")
case(LINE, "a seed that is no number", RUN + " --seed one", "--seed one", "expected a whole number")
case(LINE, "a negative seed", RUN + " --seed -1", "seed", "greater than or equal to 0, found -1")
case(LINE, "a number of workers below 0", RUN + " --workers -1", "simulation.workers", "found -1")
case(LINE, "--set without a value", SET + "rounds", "--set rounds", "expected KEY=VALUE")
case(LINE, "--set below a value", SET + "rounds.of=3", "--set rounds.of=3", "'rounds' is a value, not a table")
case(LINE, "--set with an empty key", SET + "training.=3", "training.", "known: epochs")
case(LINE, "--grid without values", "sweep {config} --grid lr --out {out}", "--grid lr", "expected KEY=VALUE,VALUE")
case(
    LINE, "--grid over an unknown key", "sweep {config} --grid training.rate=1,2 --out {out}", "training.rate", "known"
)
case(LINE, "an unknown table format", "table {run} --format html", "--format html", "expected one of text, markdown")
case(LINE, "a comparison with an absent method", "table {run} --compare bars fedbn", "'fedbn'", "there are bars")
case(LINE, "an unknown executor", RUN + " --executor fast", "simulation.executor", "'auto', 'loop' or 'vmap'")
case(LINE, "two runs of one name and seed", "run {config} {config} --out {out}", "bars-seed0", "change 'name'")
case(LINE, "a round that is no number", RESUME + " --round last", "'--round'", "not a valid integer")

KEYS = "configuration"
case(KEYS, "no such file", "run {root}/none.toml --out {out}", "none.toml", "no such configuration file")
case(KEYS, "a folder for the file", "run {tree} --out {out}", "tree", "cannot be read as a configuration file")
case(KEYS, "not TOML", RUN, "c.toml", "line 1, column 10", write("c.toml", "rounds = = 3\n"))
case(KEYS, "not text", RUN, "c.toml", "cannot be read as a configuration", write("c.toml", b"\xff\xfe\x00rounds"))
case(KEYS, "a misspelt key", RUN, "round: ", "did you mean 'rounds'", write("c.toml", "round = 3\n"))
case(KEYS, "a misspelt table", RUN, "trainig", "did you mean 'training'", write("c.toml", "[trainig]\nlr = 1\n"))
case(KEYS, "a value for a table", RUN, "training", "found 3", write("c.toml", "training = 3\n"))
case(
    KEYS,
    "a list for a value",
    RUN,
    "federation.domains",
    "valid string",
    write("c.toml", "[federation]\ndomains = [1]"),
)
case(KEYS, "several errors at once", RUN, "rounds", "training.lr", write("c.toml", "rounds = 0\n[training]\nlr = -1\n"))
case(KEYS, "a rate that is not a number", SET + "training.lr=nan", "training.lr", "finite number, found nan")
case(KEYS, "a seed beyond 63 bits", SET + "seed=9223372036854775808", "seed", "less than 9223372036854775808")
case(KEYS, "an unknown strategy", SET + "algorithm.strategy=fedbm", "algorithm.strategy", "did you mean 'fedbn'")
case(KEYS, "an option of another strategy", SET + "algorithm.mu=0.1", "algorithm.mu", "no option of fedbn")
case(
    KEYS,
    "an option of the wrong type",
    SET + "algorithm.strategy=fedprox --set algorithm.mu=big",
    "algorithm.mu",
    "expected float",
)
case(KEYS, "an unknown axis value", SET + "algorithm.pruning=fedtyni", "algorithm.pruning", "did you mean 'fedtiny'")
case(KEYS, "an unknown model", SET + "model.name=smal-cnn", "model.name", "did you mean 'small-cnn'")
case(KEYS, "images too small for the model", SET + "model.name=alexnet", "model.name", "64x64 pixels or more")
case(
    KEYS,
    "images too small for the normalization",
    SET + "algorithm.strategy=fedavg --set algorithm.normalization=in --set federation.image-size=8",
    "examples of 3x8x8",
    "larger images",
)
case(
    KEYS,
    "nothing that a normalization could replace",
    SET + "algorithm.strategy=fedavg --set algorithm.normalization=ghost --set model.norm=gn",
    "algorithm.normalization",
    "expected model.norm = 'bn'",
)
case(KEYS, "a strategy and a model without its layers", SET + "model.norm=none", "norm", "no normalization layer")
case(
    KEYS,
    "momentum with Adam",
    SET + "training.optimizer=adam --set training.momentum=0.9",
    "training.momentum",
    "remove the key",
)
case(KEYS, "an unknown augmentation", SET + "training.augment=blur", "training.augment", "known: none, flip")
case(KEYS, "batches of one under BatchNorm", SET + "training.batch-size=1", "training.batch-size", "expected 2 or more")
case(
    KEYS,
    "more clients a round than there are",
    SET + "federation.clients-per-round=9",
    "clients-per-round",
    "2 clients",
)
case(
    KEYS,
    "more clients than examples",
    SET + "federation.clients-per-domain=99",
    "99 clients",
    "fewer clients-per-domain",
)
case(
    KEYS, "an unknown domain", SET + "federation.domains=photo,oil", "federation.domains: 'oil'", "it has photo, sketch"
)
case(
    KEYS,
    "the one domain left out",
    SET + "federation.domains=photo --set federation.leave-out=photo",
    "federation.leave-out",
    "expected one of two or more",
)
case(KEYS, "an unknown data set", SET + "federation.dataset=digit", "federation.dataset", "did you mean 'digits'")
case(KEYS, "no root for data of one's own", SET + "federation.root=", "federation.dataset", "set federation.root")
case(
    KEYS,
    "no Ray cluster at the address",
    SET + "simulation.workers=1 --set simulation.address=127.0.0.1:1",
    "simulation.address",
    "expected HOST:PORT",
)
case(KEYS, "a name that leads out of the folder", SET + "name=../../up", "name", "no '/', no '.' in front")

DATA = "data"
FIRST = "tree/photo/ant/0.png"


def without_lists(place: Place) -> None:
    for file in place.tree.glob("*.txt"):
        file.unlink()


def move_out(name: str) -> Arrange:
    """A step that puts a file or folder outside of the root and a symbolic link in its place."""

    def step(place: Place) -> None:
        (place.root / name).rename(place.root / "outside")
        (place.root / name).symlink_to(place.root / "outside")

    return step


case(DATA, "a root that does not exist", SET + "federation.root={root}/none", "none", "expected a folder with domain")
case(
    DATA, "a file for the root", SET + "federation.root={config}", "c.toml: is a file", "expected a folder with domain"
)
case(
    DATA,
    "an empty root",
    RUN,
    "tree",
    "expected <domain>/<class>",
    lambda p: shutil.rmtree(p.tree),
    on("tree", Path.mkdir),
)
case(DATA, "a domain without classes", RUN, "tree/oil", "expected oil/<class>", on("tree/oil", Path.mkdir))
case(
    DATA,
    "a domain without images",
    RUN,
    "tree/photo",
    "expected <class>/*.png",
    without_lists,
    lambda p: [f.unlink() for f in p.tree.glob("photo/*/*.png")],
)
case(
    DATA,
    "one of the two lists",
    RUN,
    "photo_test.txt",
    "expected both lists or neither",
    on("tree/photo_test.txt", Path.unlink),
)
case(
    DATA,
    "a list with a bad line",
    RUN,
    "photo_test.txt, line 1",
    "expected 'relative/path label'",
    write("tree/photo_test.txt", "0.png\n"),
)
case(
    DATA,
    "a list that is not text",
    RUN,
    "photo_test.txt",
    "cannot be read as a list",
    write("tree/photo_test.txt", b"\xff\xfe"),
)
case(
    DATA,
    "a label of two classes",
    RUN,
    "photo_test.txt, line 2",
    "expected one class folder a label",
    write("tree/photo_test.txt", "photo/ant/0.png 0\nphoto/bee/0.png 0\n"),
)
case(DATA, "a list without images", RUN, "'photo', test", "every domain needs some", write("tree/photo_test.txt", "\n"))
case(DATA, "a listed image that is missing", RUN, "ant/0.png", "listed but does not exist", on(FIRST, Path.unlink))
case(
    DATA,
    "a list that leads out of the root",
    RUN,
    "../secret/ant/0.png",
    "only files inside it",
    write("tree/photo_test.txt", "../secret/ant/0.png 0\n"),
)
case(DATA, "a symbolic link out of the root", RUN, "photo/ant/0.png", "only files inside it", move_out(FIRST))
case(
    DATA,
    "a class folder that is a link out of the root",
    RUN,
    "photo/ant/0.png",
    "only files inside it",
    without_lists,
    move_out("tree/photo/ant"),
)
case(DATA, "a text file named .png", RUN, "ant/0.png", "mend the file or take it out", write(FIRST, "no image\n"))
case(DATA, "an image cut short", RUN, "ant/0.png", "mend the file or take it out", on(FIRST, cut))
case(DATA, "an image with a bit turned over", RUN, "ant/0.png", "mend the file or take it out", on(FIRST, flip))
case(DATA, "an empty image", RUN, "ant/0.png", "mend the file or take it out", write(FIRST, b""))
case(DATA, "a folder named .png", RUN, "ant/0.png", "mend the file or take it out", on(FIRST, folder_for))


def idx(name: str, content: bytes) -> Arrange:
    """A step that writes MNIST's four files, one of them with this content."""

    def step(place: Place) -> None:
        (place.root / "idx").mkdir()
        for prefix in ("train", "t10k"):
            images = struct.pack(">4I", 0x803, 10, 4, 4) + bytes(160)
            (place.root / "idx" / f"{prefix}-images-idx3-ubyte").write_bytes(images)
            labels = struct.pack(">2I", 0x801, 10) + bytes(range(10))
            (place.root / "idx" / f"{prefix}-labels-idx1-ubyte").write_bytes(labels)
        (place.root / "idx" / name).write_bytes(content)

    return step


IDX = "data info idx --root {root}/idx"
X, Y = "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
SHORT = struct.pack(">4I", 0x803, 10, 4, 4) + bytes(100)
case(DATA, "an IDX file cut short", IDX, X, "holds 100 values, its header promises 160", idx(X, SHORT))
case(DATA, "an IDX file cut in its header", IDX, X, "ends inside its header", idx(X, SHORT[:9]))
case(DATA, "an IDX file of floats", IDX, X, "begins with 00 00 0d 03", idx(X, b"\0\0\x0d\3" + SHORT[4:]))
case(
    DATA,
    "fewer IDX labels than images",
    IDX,
    "'idx', test",
    "10 examples but 9",
    idx(Y, struct.pack(">2I", 0x801, 9) + bytes(9)),
)
case(DATA, "an IDX file missing", IDX, Y, "is missing (with or without .gz)", idx(Y, b""), on(f"idx/{Y}", Path.unlink))
case(
    DATA,
    "a damaged gzip",
    IDX,
    f"{Y}.gz",
    "cannot be read",
    idx(Y, b""),
    on(f"idx/{Y}", Path.unlink),
    write(f"idx/{Y}.gz", gzip.compress(bytes(18), mtime=0)[:-6]),
)


def digits_five(content: Any) -> Arrange:
    """A step that writes FedBN's package with ``content`` for the test set of its first domain."""

    def step(place: Place) -> None:
        good = pickle.dumps((BLACK, LABELS))
        for domain in ("MNIST", "SVHN", "USPS", "SynthDigits", "MNIST_M"):
            folder = place.root / "five" / domain / "partitions"
            folder.mkdir(parents=True)
            (folder / "train_part0.pkl").write_bytes(good)
            (folder.parent / "test.pkl").write_bytes(good)
        bad = content if isinstance(content, bytes) else pickle.dumps(content)
        (place.root / "five" / "MNIST" / "test.pkl").write_bytes(bad)

    return step


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("echo harm",)


FIVE, PKL = "data info digits-five --root {root}/five", "MNIST/test.pkl"
BLACK, LABELS = np.zeros((20, 28, 28), np.uint8), np.arange(20) % 10
case(DATA, "a pickle that calls a function", FIVE, PKL, "expected a pickled pair", digits_five(pickle.dumps(Harmful())))
case(DATA, "a pickle cut short", FIVE, PKL, "expected a pickled pair", digits_five(pickle.dumps((BLACK, LABELS))[:-9]))
case(DATA, "a pickle of something else", FIVE, PKL, "expected a pair", digits_five({"x": 1}))
case(DATA, "labels out of range", FIVE, "'mnist', test", "expected integers 0 to 9", digits_five((BLACK, LABELS + 1)))
case(
    DATA,
    "labels that are no whole numbers",
    FIVE,
    PKL,
    "expected whole numbers 0 to 9",
    digits_five((BLACK, LABELS + 0.5)),
)
case(
    DATA,
    "labels that are not finite",
    FIVE,
    PKL,
    "expected whole numbers 0 to 9",
    digits_five((BLACK, np.full(20, np.inf))),
)
case(DATA, "images of floats", FIVE, PKL, "expected uint8 [N, H, W]", digits_five((BLACK.astype(float), LABELS)))
case(
    DATA,
    "images of two channels",
    FIVE,
    PKL,
    "expected uint8 [N, H, W]",
    digits_five((np.stack([BLACK] * 2, 3), LABELS)),
)
case(DATA, "fewer labels than images", FIVE, PKL, "20 examples but 19 labels", digits_five((BLACK, LABELS[:-1])))
case(DATA, "no images at all", FIVE, "'mnist', test", "every domain needs some", digits_five((BLACK[:0], LABELS[:0])))

PLAYS = "data info roles --root {root}/plays.jsonl"
SPEECH = '{"play": "a", "role": "b", "text": "c"}\n'
case(
    DATA,
    "a line of plays that is no JSON",
    PLAYS,
    "plays.jsonl, line 2",
    'expected an object {"play"',
    write("plays.jsonl", SPEECH + "ENTER GHOST\n"),
)
case(DATA, "plays of short roles alone", PLAYS, "plays.jsonl", "at least 1000 characters", write("plays.jsonl", SPEECH))

CACHE = "cache of built data sets"
CACHED = "data info folder --root {tree}"


def cached(name: str, spoil: Callable[[Path], Any]) -> Arrange:
    """A step that lets the data set be built, then spoils one of its files."""

    def step(place: Place) -> None:
        shutil.rmtree(place.root / "cache")
        fedsim_command("data", "info", "folder", "--root", place.tree, environment=place.environment)
        (folder,) = (place.root / "cache").glob("folder-*")
        spoil(folder / name)

    return step


def relabel(path: Path) -> None:
    labels = np.load(path)
    labels[5] = 3
    np.save(path, labels)


ANEW = "remove the folder and it is built anew"
case(CACHE, "a description cut short", CACHED, "cache/folder-", ANEW, cached("meta.json", cut))
case(CACHE, "an array cut short", CACHED, "cache/folder-", ANEW, cached("train_x.npy", cut))
case(CACHE, "no labels", CACHED, "cache/folder-", ANEW, cached("train_y.npy", Path.unlink))
case(CACHE, "a label out of range", CACHED, "cache/folder-", ANEW, cached("train_y.npy", relabel))
case(CACHE, "a pixel turned over", CACHED, "cache/folder-", ANEW, cached("test_x.npy", lambda path: flip(path, 0.9)))
case(
    CACHE,
    "a file where the folder should be",
    CACHED,
    "cache/folder-",
    "set FEDSIM_CACHE",
    lambda p: shutil.rmtree(p.root / "cache"),
    write("cache", ""),
    code=1,
)

WEIGHTS = "initial weights"
BY, W = SET + "model.weights={root}/w.safetensors", "w.safetensors"
case(WEIGHTS, "no such file", BY, W, "No such file")
case(WEIGHTS, "a pickled .pth file", BY, W, ".pth files are not read", on(W, lambda path: torch.save({"w": 1}, path)))
case(
    WEIGHTS, "weights of another model", BY, W, "28 missing", on(W, lambda path: save_file({"w": torch.zeros(3)}, path))
)
case(WEIGHTS, "a folder for the file", BY, W, "Is a directory", on(W, Path.mkdir))

RUNS = "run directory"
NEWEST = "run/checkpoints/round-000003"
JSON, TENSORS, BEFORE = f"{NEWEST}.json", f"{NEWEST}.safetensors", "resume --round 2"


def change(name: str, old: str, new: str) -> Arrange:
    def step(place: Place) -> None:
        text = (place.root / name).read_text()
        assert old in text
        (place.root / name).write_text(text.replace(old, new))

    return step


def begin(path: Path) -> None:
    """Keep the first twenty bytes."""
    path.write_bytes(path.read_bytes()[:20])


def hold(lock: str) -> None:
    """Take the lock of a run directory, as another process does."""
    fcntl.flock(os.open(lock, os.O_RDWR), fcntl.LOCK_EX)


case(RUNS, "resume where no run is", "resume {root}/none", "none", "expected the --out")
case(RUNS, "resume a file", "resume {config}", "c.toml", "expected the --out")
case(RUNS, "a new run where one is already", "run {config} --out {run}", "run", "'fedsim resume")
case(RUNS, "a file for the new run directory", "run {config} --out {config}", "c.toml", "choose another --out")
case(RUNS, "a new run below a file", "run {config} --out {config}/x", "c.toml/x", "choose another --out")
case(RUNS, "a round without a checkpoint", RESUME + " --round 1", "round-000001.json", "checkpoints of round 2, 3")
case(RUNS, "the newest checkpoint cut short", RESUME, TENSORS, BEFORE, on(TENSORS, cut))
case(RUNS, "a bit of the newest checkpoint turned over", RESUME, TENSORS, BEFORE, on(TENSORS, flip))
case(RUNS, "the newest checkpoint's tensors missing", RESUME, JSON, BEFORE, on(TENSORS, Path.unlink))
case(RUNS, "the newest checkpoint's header cut short", RESUME, JSON, BEFORE, on(JSON, begin))
case(RUNS, "a figure in the header changed", RESUME, JSON, BEFORE, change(JSON, '"bytes_up": ', '"bytes_up": 1'))
case(RUNS, "a checkpoint's header that is a list", RESUME, JSON, BEFORE, write(JSON, "[]"))
case(RUNS, "a checkpoint's header without its record", RESUME, JSON, BEFORE, change(JSON, '"record"', '"recall"'))
case(RUNS, "a folder for the checkpoint's header", RESUME, JSON, BEFORE, on(JSON, folder_for))
case(
    RUNS,
    "all checkpoints cut short",
    RESUME + " --round 2",
    "round-000002",
    "checkpoints of round 3",
    lambda p: [cut(f) for f in p.run.glob("checkpoints/*.safetensors")],
)
case(
    RUNS,
    "another model than the run's",
    RESUME,
    "model.name",
    "--allow-other-numerics",
    change("run/config.toml", '"small-cnn"', '"digits-cnn"'),
)
case(
    RUNS,
    "another rate than the run's",
    RESUME,
    "training.lr was 0.05, is 0.5",
    "--allow-other-numerics",
    change("run/config.toml", "lr = 0.05", "lr = 0.5"),
)
case(
    RUNS,
    "other data than the run's",
    RESUME,
    "dataset_sha256",
    "--allow-other-numerics",
    on(FIRST, lambda path: shutil.copy(path.with_name("1.png"), path)),
)
case(
    RUNS,
    "a damaged configuration in the run",
    RESUME,
    "run/config.toml",
    "not valid TOML",
    write("run/config.toml", "rounds = = 3"),
)
case(
    RUNS,
    "a folder for the run's configuration",
    RESUME,
    "run/config.toml",
    "cannot be read",
    on("run/config.toml", folder_for),
)
case(RUNS, "a folder for the events", RESUME, "run/events.jsonl", "Is a directory", on("run/events.jsonl", folder_for))
case(
    RUNS,
    "another process at work there",
    RESUME,
    "run",
    "wait for it or stop it",
    before=hold,
    extra=lambda p: (f"{p.run}/run.lock",),
)

BASES = "databases"
METRICS, PRIVATE = "run/metrics.sqlite", "run/clients.sqlite"
NO_BASE = b"SQLite? no. " * 400


def execute(name: str, *statements: str) -> Arrange:
    def step(place: Place) -> None:
        db = sqlite3.connect(place.root / name)
        for statement in statements:
            db.execute(statement)
        db.commit()
        db.close()

    return step


def scribble(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:4096] + bytes(range(256)) * 16 + data[8192:])


case(
    BASES,
    "plot without metrics",
    "plot {run}",
    METRICS,
    "expected the metrics.sqlite of a run",
    on(METRICS, Path.unlink),
)
case(
    BASES,
    "a folder for the metrics",
    "plot {run}",
    METRICS,
    "expected the metrics.sqlite of a run",
    on(METRICS, folder_for),
)
case(BASES, "metrics that are no database", "plot {run}", METRICS, "take a whole copy", write(METRICS, NO_BASE))
case(BASES, "metrics cut short", "plot {run}", METRICS, "take a whole copy", on(METRICS, cut))
case(BASES, "a page of the metrics written over", "plot {run}", METRICS, "take a whole copy", on(METRICS, scribble))
case(BASES, "an empty metrics file", "plot {run}", METRICS, "take a whole copy", write(METRICS, b""))
case(
    BASES,
    "metrics of another program",
    "plot {run}",
    METRICS,
    "take a whole copy",
    execute(METRICS, "DROP TABLE records", "CREATE TABLE records (x)"),
)
case(
    BASES,
    "metrics without accuracy",
    "plot {run}",
    METRICS,
    "no accuracy of 'photo'",
    execute(METRICS, "DELETE FROM records"),
)
case(BASES, "resume with metrics that are no database", RESUME, METRICS, "move the file away", write(METRICS, NO_BASE))
case(
    BASES,
    "a client's private state turned over",
    RESUME + " --round 2",
    "client 0",
    "resume --round",
    execute(PRIVATE, "UPDATE states SET data = zeroblob(9)"),
    under_way=True,
)
case(BASES, "private states that are no database", RESUME, PRIVATE, "move the file away", write(PRIVATE, NO_BASE))
case(BASES, "a folder for the private states", RESUME, PRIVATE, "move the file away", on(PRIVATE, folder_for))

TABLES = "summary and tables"
SUMMARY = "run/summary.json"


def words_for_figures(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "accuracy": {"photo": "high"}}))


PUBLISHED = "table {run} --published {root}/p.toml"
case(TABLES, "a table of no run", "table {root}/none", "none", "no such run directory")
case(TABLES, "a table of a folder without runs", "table {tree}", "tree", "no finished run inside")
case(TABLES, "a summary cut short", "table {run}", SUMMARY, "'fedsim resume", on(SUMMARY, begin))
case(TABLES, "a summary that is a list", "table {run}", SUMMARY, "'fedsim resume' writes it anew", write(SUMMARY, "[]"))
case(
    TABLES,
    "a summary without figures",
    "table {run}",
    SUMMARY,
    "'fedsim resume' writes it anew",
    write(SUMMARY, '{"name": "x"}'),
)
case(
    TABLES,
    "a summary with words for figures",
    "table {run}",
    SUMMARY,
    "expected a number for every domain",
    on(SUMMARY, words_for_figures),
)
case(TABLES, "an unfinished run", "table {run}", "summary.json", "'fedsim resume' it", on(SUMMARY, Path.unlink))
case(TABLES, "one run twice", "table {run} {run}", "run", "name one of them")
case(TABLES, "published figures that are missing", PUBLISHED, "p.toml", "cannot be read")
case(
    TABLES,
    "published figures with a word",
    PUBLISHED,
    "p.toml: [a]",
    "expected lines like",
    write("p.toml", "[a]\nphoto = 'high'\n"),
)
case(
    TABLES,
    "published figures of an empty table",
    PUBLISHED,
    "p.toml: [a]",
    "expected lines like",
    write("p.toml", "[a]\n"),
)
case(TABLES, "a file for the folder of pictures", "plot {run} --out {config}", "c.toml", "choose another --out")

KEY = "keys"
CLIENT = "client --server localhost:1 --ca {config} --key {config} --domain photo --data {tree}"
case(KEY, "an authority made twice", "keys ca {root}/ca", "ca/ca.key", "move it away", write("ca/ca.key", ""))
case(KEY, "a client's name that is a path", "keys node {root} ../x", "'../x'", "expected letters, digits")
case(KEY, "a public key that is none", "keys register {config} --clients-dir {root}/k", "c.toml", "expected a NAME.pub")
case(KEY, "revoking a stranger", "keys revoke ann --clients-dir {root}", "'ann'", "known: nobody")
case(KEY, "a private key that others can read", CLIENT, "c.toml", "chmod 600")
case(
    KEY,
    "a private key that is none",
    CLIENT,
    "c.toml",
    "'fedsim keys node' makes one",
    on("c.toml", lambda path: path.chmod(0o600)),
)

DISK = "disk"


def disk(path: str, kilobytes: int = 0) -> dict[str, Any]:
    """Options of a case whose command finds a disk of so many kB at this path, or (0) that path read-only."""
    if kilobytes:
        return {"before": full_disk, "extra": lambda p: (f"{p.root}/{path}", kilobytes), "code": 1}
    return {"before": read_only, "extra": lambda p: (f"{p.root}/{path}",)}


EMPTY_CACHE = (lambda p: shutil.rmtree(p.root / "cache"), on("cache", Path.mkdir))
case(
    DISK,
    "a read-only folder for the run",
    "run {config} --out {root}/ro/x",
    "ro/x",
    "choose another --out",
    on("ro", Path.mkdir),
    **disk("ro"),
)
case(DISK, "resume in a read-only folder", RESUME, "run/run.lock", "make it writable", **disk("run"))
case(
    DISK,
    "plot into a read-only folder",
    "plot {run}",
    "run/plots",
    "choose another --out",
    **{**disk("run"), "code": 1},
)
case(DISK, "a read-only cache", RUN, "cache/folder-", "set FEDSIM_CACHE", *EMPTY_CACHE, **{**disk("cache"), "code": 1})
case(DISK, "a cache on a full disk", RUN, "cache/folder-", "set FEDSIM_CACHE", **disk("cache", 16))
case(
    DISK, "a disk of 8 kB for the run", RUN, "out/clients.sqlite", "make room there and run it again", **disk("out", 8)
)
case(
    DISK,
    "a disk of 96 kB for the run",
    RUN,
    "out/metrics.sqlite",
    "make room there and run it again",
    **disk("out", 96),
)
case(
    DISK,
    "a disk of 256 kB for the run",
    RUN,
    "out/checkpoints/round-",
    "make room there; 'fedsim resume'",
    **disk("out", 256),
)
case(
    DISK,
    "a disk of 600 kB for the run",
    RUN,
    "out/checkpoints/round-",
    "make room there; 'fedsim resume'",
    **disk("out", 600),
)
case(DISK, "a run below /proc", "run {config} --out /proc/fedsim", "/proc/fedsim", "choose another --out")
