"""Guarantees of the digits suite."""

import zipfile

import numpy as np
import pytest

from fedsim.data import load_dataset
from fedsim.data.digits import DOMAINS, build_digits, suite
from fedsim.data.digits.sources import PACK, REGIONS, crop, fonts, pictures
from fedsim.data.digits.suite import TEST, TRAIN, _pool
from fedsim.errors import DataError


def test_shapes_types_and_labels(digits):
    assert tuple(digits) == DOMAINS
    for splits in digits.values():
        for split, count in (("train", 12), ("test", 15)):
            x, y = splits[split]
            assert (x.shape, x.dtype) == ((count, 3, 28, 28), np.uint8)
            assert (y.shape, y.dtype) == ((count,), np.int64)
            assert set(y) <= set(range(10))


def test_the_same_bytes_with_two_processes(digits):
    again = build_digits(0, train=12, test=15, workers=2)
    for domain in DOMAINS:
        for split in ("train", "test"):
            assert all(map(np.array_equal, digits[domain][split], again[domain][split])), (domain, split)


def test_image_i_depends_on_nothing_but_its_number(digits):
    fewer = build_digits(0, train=7, test=5, workers=1, domains=("street", "mnistm", "utility", "mnist"))
    for domain, splits in fewer.items():
        for split, (x, y) in splits.items():
            assert np.array_equal(x, digits[domain][split][0][: len(x)]), (domain, split)
            assert np.array_equal(y, digits[domain][split][1][: len(y)])


def test_another_seed_draws_other_images(digits):
    other = build_digits(1, train=5, test=5, workers=1)
    for domain in set(DOMAINS) - {"optdigits"}:  # its rows are cut in the order of writing, whatever the seed
        assert not np.array_equal(other[domain]["train"][0], digits[domain]["train"][0][:5]), domain


def test_real_digits_are_never_shared():
    def rows(domain, split):
        x, _ = _pool(domain, split, 0)
        return {image.tobytes() for image in x}

    mnist = [rows(d, s) for d in ("mnist", "mnistm") for s in ("train", "test")]
    assert sum(map(len, mnist)) == len(set().union(*mnist)) == 5000
    for domain, total in (("utility", 1994), ("optdigits", 1797)):
        x, y = zip(*(_pool(domain, split, 0) for split in ("train", "test")))
        assert [len(p) for p in x] == [TRAIN, total - TRAIN]
        if domain == "utility":
            assert not rows(domain, "train") & rows(domain, "test")
            assert np.ptp(np.bincount(y[0])) <= 1, "the training digits are spread evenly over the classes"
    assert len(_pool("mnist", "test", 0)[0]) >= TEST


@pytest.mark.parametrize("kind", ["photo", "texture"])
def test_crops_of_train_and_test_share_no_pixel(monkeypatch, kind):
    """Pictures whose values are their columns: crops, enlarged or not, stay on their side of the gap."""
    columns = np.repeat(np.arange(240, dtype=np.uint8)[None], 200, axis=0)
    picture = np.stack([columns] * 3, -1) if kind == "photo" else columns
    monkeypatch.setattr("fedsim.data.digits.sources.pictures", lambda _: (picture,))
    seen = {"train": set(), "test": set()}
    for i in range(200):
        for split, values in seen.items():
            values.update(crop(np.random.default_rng(i), kind, split, 48, (0.4, 1.0)).ravel().tolist())
    assert max(seen["train"]) < REGIONS["train"][1] * 240 <= REGIONS["test"][0] * 240 - 1 <= min(seen["test"])


def test_every_face_has_the_notice_of_its_makers_and_the_text_of_its_licence():
    lines = (PACK / "licenses" / "NOTICES.tsv").read_text().splitlines()[1:]
    notices = {tuple(line.split("\t")[:3]): line.split("\t")[3] for line in lines}
    with zipfile.ZipFile(PACK / "digit_fonts.zip") as archive:
        manifest = archive.read("MANIFEST.tsv").decode().splitlines()
    assert [*notices] == [tuple(line.split("\t")) for line in manifest]
    assert all("opyright" in notice or "©" in notice for notice in notices.values())
    texts = {
        "Bitstream-Vera": "DejaVu",
        "STIX": "STIX",
        "Knuth/BaKoMa": "BaKoMa",
        "OFL-1.1": "OFL-1.1",
        "Ubuntu-font-1.0": "Ubuntu",
    }
    for licence in {licence for _, _, licence in notices} - {"Apache-2.0"}:  # the project's own
        assert (PACK / "licenses" / f"{texts[licence]}.txt").stat().st_size > 1000


def test_the_pack_is_whole():
    assert len(pictures("photo")) == 7
    assert len(pictures("texture")) == 3
    assert len(fonts().names) == 83
    assert 60 < len(fonts().on_houses) < 83
    provenance = (PACK / "README.md").read_text()
    for file in set(PACK.rglob("*.*")) - {PACK / "README.md"}:
        assert file.name in provenance, f"{file} has no line of provenance"


def test_no_image_is_there_twice(digits):
    seen = [image.tobytes() for splits in digits.values() for x, _ in splits.values() for image in x]
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize(("domain", "most"), [("mnist", 850), ("mnistm", 850), ("utility", 743), ("optdigits", 743)])
def test_too_many_real_digits_are_refused(domain, most):
    with pytest.raises(DataError, match=f"'{domain}': 900 training images asked for, {most} exist"):
        load_dataset("digits", train_per_domain=900, domains=[domain], progress=False)


def test_rendered_domains_have_any_number():
    x, _ = build_digits(0, train=1001, test=1, domains=("synth",), workers=1)["synth"]["train"]
    assert len({image.tobytes() for image in x}) == 1001


def test_the_suite_is_built_once(monkeypatch, capfd):
    monkeypatch.setattr(suite, "TEST", 4)
    first = load_dataset("digits", train_per_domain=5, domains=["optdigits", "mnistm"])
    assert (first.domains, first.shape) == (("optdigits", "mnistm"), (3, 28, 28))
    assert (len(first.x_train), len(first.x_test)) == (10, 8)
    assert "drawing the digits suite, once" in capfd.readouterr().err
    monkeypatch.setattr(suite, "build_digits", None)
    again = load_dataset("digits", train_per_domain=5, domains=["mnistm", "optdigits"])
    assert (again.folder, again.digest) == (first.folder, first.digest)
    assert capfd.readouterr().err == ""


def test_bad_requests():
    with pytest.raises(DataError, match="no domain 'svhn'; it has mnist, utility"):
        load_dataset("digits", domains=["svhn"])
    with pytest.raises(DataError, match="0 training images"):
        load_dataset("digits", train_per_domain=0)


def test_processes_that_cannot_start_change_nothing(monkeypatch, digits):
    """A script without a ``__main__`` guard breaks the pool: what is missing is drawn in this process."""

    class Broken:
        __init__ = __exit__ = lambda self, *args, **options: None

        def __enter__(self):
            return self

        def map(self, function, jobs, chunksize):
            yield function(jobs[0])
            raise suite.BrokenProcessPool

    monkeypatch.setattr(suite, "ProcessPoolExecutor", Broken)
    ticks = []
    again = build_digits(0, train=12, test=15, domains=("synth",), workers=2, tick=ticks.append)
    assert np.array_equal(again["synth"]["test"][0], digits["synth"]["test"][0])
    assert sum(ticks) == 27
