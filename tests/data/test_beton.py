"""A .beton file is what its description says, or it is refused in one line that names it."""

from __future__ import annotations

import json
import os
import shutil
import time

import pytest

from ckd_dist.core import dist
from ckd_dist.core.errors import UserError
from ckd_dist.core.options import load_config
from ckd_dist.data import beton
from ckd_dist.data.beton import content_hash, open_beton
from ckd_dist.data.dataset import read_info
from ckd_dist.train.options import EvaluateConfig
from data_prep.beton import reader


@pytest.fixture
def images(fashion, tmp_path, monkeypatch):
    """A copy of the held-out images, which nobody has compared yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "x.beton"
    for suffix in ("", ".json"):
        shutil.copy(f"{fashion['holdout']}{suffix}", f"{path}{suffix}")
    return path


def refusal(path, **options):
    with pytest.raises(UserError) as error:
        open_beton(path, "data.train", **options)
    assert "\n" not in str(error.value) and str(error.value).startswith(f"data.train: {path}")
    return str(error.value)


def flip(path, position):
    """Flip a bit of a byte."""
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(time.time_ns(), time.time_ns()))  # the system's own clock is coarser than these tests


def places(path):
    """Where the images begin in the file: which process wrote which, and so where padding lies, is chance."""
    return beton.field_metadata(beton.Reader(str(path)), "image")["data_ptr"].astype(int).tolist()


def test_reader_and_writer_agree_on_the_hash(fashion, photographs):
    for path in (fashion["holdout"], photographs):
        info = read_info(path, "")
        assert content_hash(info) == reader.content_hash(path) == info.content_hash


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"num_classes": 5, "classes": []}, "holds labels from 0 to 9, "),
        ({"num_classes": 5}, "names 10 classes of 5: write "),
        ({"num_classes": "10"}, "is damaged (num_classes: Input should be a valid integer)"),
        ({"num_classes": 10.5}, "is damaged (num_classes: "),
        ({"num_classes": 10**40}, "is damaged (num_classes: "),
        ({"count": 300}, "holds 301 images, "),
        ({"count": 0}, "is damaged (count: "),
        ({"image_size": {"min": [28, 28], "max": [28, 29]}}, "holds images of (28, 28) to (28, 28) pixels, "),
        ({"image_size": {"min": [28, 28]}}, "is damaged (image_size.max: Field required)"),
        ({"normalization": {"mean": [0.2, 0.2, float("nan")], "std": [1, 1, 1]}}, "is damaged (normalization.mean.2: "),
        ({"normalization": {"mean": [0.2, 0.2, 0.2], "std": [0, 1, 1]}}, "is damaged (normalization.std.0: "),
        ({"content_hash": "sha256:0"}, "is damaged: its content has hash sha256:"),
        ({"content_hash": None}, "is damaged (content_hash: "),
        ({"beton_bytes": 5}, "x.beton.json says 5: write it anew"),
        ({"format": 2}, "is damaged (format: Input should be 1)"),
        (b"{", "is damaged (Invalid JSON"),
        (b"\xff", "is damaged ("),
        (100_000 * b"[", "is damaged ("),
        (os.mkfifo, "x.beton.json is missing"),
    ],
    ids=range(19),
)
def test_a_description_that_is_not_of_the_file_is_refused(images, change, expected):
    description = images.with_name("x.beton.json")
    if isinstance(change, dict):
        description.write_text(json.dumps({**json.loads(description.read_text()), **change, "added": "later"}))
    else:
        description.unlink()
        description.write_bytes(change) if isinstance(change, bytes) else change(description)
    assert expected in refusal(images)


def test_a_flipped_bit_anywhere_in_the_images_is_found(images):
    first, *_, last = places(images)
    allocation_table = images.stat().st_size - 12
    for position in (first, last + 28 * 28 * 3 - 1, allocation_table, 0):
        flip(images, position)
        assert "x.beton" in refusal(images)
        flip(images, position)
    open_beton(images, "data.train")
    flip(images, first)
    assert "is damaged: its content has hash" in refusal(images)
    open_beton(images, "data.train", verify=False)
    assert load_config(EvaluateConfig, ["--data.val=x", "--checkpoint=c", "--data.verify=false"]).data.verify is False


def test_a_file_is_read_whole_once_and_again_when_it_has_changed(images, monkeypatch):
    counted = []
    monkeypatch.setattr(beton, "content_hash", lambda info: counted.append(1) or content_hash(info))
    for _ in range(2):
        open_beton(images, "data.train")
        assert len(counted) == 1 and images.with_name("x.beton.verified").is_file()
    shutil.copy(images, images.with_name("y"))
    os.utime(images.with_name("y"), ns=(time.time_ns(), time.time_ns()))
    os.replace(images.with_name("y"), images)  # another inode, another time
    open_beton(images, "data.train")
    assert len(counted) == 2
    # Beside a file in a folder that cannot be written nothing can be left: here even root cannot replace a folder.
    record = images.with_name("x.beton.verified")
    record.unlink()
    record.mkdir()
    for _ in range(2):
        open_beton(images, "data.train")
        assert len(counted) == 3
    record.rmdir()
    record.write_text("[")
    (images.parent / "cache" / "ckd_dist").rename(images.parent / "cache" / "elsewhere")
    open_beton(images, "data.train")
    assert len(counted) == 4


def test_every_nodes_own_copy_is_compared_and_a_shared_file_once(images, monkeypatch):
    flip(images, places(images)[0])
    monkeypatch.setattr(dist, "rank", lambda: 1)

    def gather_beside(rank_0):
        answers = iter([rank_0, None])  # its file, and what is wrong with it
        monkeypatch.setattr(dist, "gather_objects", lambda mine: [next(answers) or mine, mine])

    gather_beside(("another", 0, 0))
    assert "is damaged" in refusal(images)
    gather_beside(None)  # the same file: rank 0 reads it
    open_beton(images, "data.train")
