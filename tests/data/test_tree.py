"""Folder trees: split by lists or by the seed, cached by content, every fault named."""

import os

import numpy as np
import pytest

from fedsim.data import load_dataset
from fedsim.data.images import inside
from fedsim.errors import DataError


def load(root, seed=0):
    return load_dataset("folder", root, seed, image_size=8, progress=False)


def test_without_lists_each_class_is_split_and_it_says_so(tree, capsys):
    data = load(tree)
    assert (data.domains, data.classes, data.shape) == (("art painting", "photo"), ("dog", "house"), (3, 8, 8))
    for domain in data.domains:
        assert np.bincount(data.y_test[data.slice(domain, "test")]).tolist() == [2, 2]
        assert np.bincount(data.y_train[data.slice(domain, "train")]).tolist() == [8, 8]
    assert "photo: no split lists; a fifth of each class, drawn with seed 0" in capsys.readouterr().err
    assert load(tree).folder == data.folder
    assert capsys.readouterr().err == "", "read once, then cached"
    assert load(tree, seed=1).digest != data.digest


def test_a_changed_file_is_read_again(tree, write_image):
    before = load(tree)
    write_image(tree / "photo" / "dog" / "new.png")
    assert load(tree).digest != before.digest


def write_lists(tree, train: str, test: str = "photo/dog/3.jpg 0\nphoto/house/3.jpg 1\n"):
    (tree / "photo_train.txt").write_text(train)
    (tree / "photo_test.txt").write_text(test)


@pytest.mark.parametrize("first", [0, 1])
def test_split_lists_count_from_0_or_from_1_as_those_of_pacs(tree, first):
    lines = [f"{{0}}/dog/{i}.jpg {first}\n{{0}}/house/{i}.jpg {first + 1}\n" for i in range(3)]
    for domain in ("photo", "art painting"):
        (tree / f"{domain}_train.txt").write_text((lines[0] + lines[1]).format(domain))
        (tree / f"{domain}_test.txt").write_text(lines[2].format(domain) + "\n")
    data = load(tree)
    assert data.y_train.tolist() == [0, 1] * 4
    assert data.y_test.tolist() == [0, 1] * 2


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("photo/dog/1.jpg", r"photo_train.txt, line 2: expected 'relative/path label'"),
        ("photo/dog/1.jpg x", "expected 'relative/path label', found"),
        ("photo/house/1.jpg 0", "line 2: label 0 is 'house' here and 'dog' above"),
        ("photo/cat/1.jpg 2", "unknown class 'cat'; expected one of dog, house"),
        ("photo/dog/none.jpg 0", r"none\.jpg: this image is listed but does not exist"),
        ("../photo/dog/1.jpg 0", "leads out of this folder"),
        ("/etc/passwd 0", "leads out of this folder"),
    ],
)
def test_bad_lines(tree, line, expected):
    write_lists(tree, f"photo/dog/0.jpg 0\n{line}\n")
    with pytest.raises(DataError, match=expected):
        load(tree)


def test_bad_lists(tree):
    write_lists(tree, "")
    with pytest.raises(DataError, match="domain 'photo', train: no examples"):
        load(tree)
    (tree / "photo_train.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"photo_train\.txt: cannot be read as a list"):
        load(tree)
    (tree / "photo_train.txt").unlink()
    with pytest.raises(DataError, match=r"photo_train\.txt: does not exist, while its companion does"):
        load(tree)


def test_missing_and_unreadable(tree, tmp_path):
    with pytest.raises(DataError, match="does not exist; expected a folder with domain folders"):
        load(tmp_path / "nowhere")
    whole = (tree / "photo" / "dog" / "1.jpg").read_bytes()
    for damage in (b"", b"not an image", whole[: len(whole) // 2]):
        (tree / "photo" / "dog" / "bad.jpg").write_bytes(damage)
        with pytest.raises(DataError, match=r"bad\.jpg: cannot be read as an image"):
            load(tree)
    (tree / "empty").mkdir()
    with pytest.raises(DataError, match="no class folders"):
        load(tree)


def test_a_failed_reading_leaves_nothing_in_the_cache(tree, tmp_path):
    (tree / "photo" / "dog" / "bad.jpg").write_bytes(b"")
    with pytest.raises(DataError):
        load(tree)
    assert list((tmp_path / "cache").iterdir()) == []


def test_nothing_outside_the_root_is_read(tree, tmp_path, write_image):
    write_image(tmp_path / "secret.png")
    os.symlink(tmp_path / "secret.png", tree / "photo" / "dog" / "link.png")
    with pytest.raises(DataError, match="leads out"):
        load(tree)
    for path in ("/etc/passwd", "../secret.png", "photo/../../secret.png", "photo/dog/link.png"):
        with pytest.raises(DataError, match="leads out"):
            inside(tree, path)
    assert inside(tree, "photo/../photo/dog/1.jpg") == (tree / "photo/dog/1.jpg").resolve()
