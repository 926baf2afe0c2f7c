"""Sets of parts, and what they are parts of."""

import hashlib
import os
import shutil
import signal
import struct
import time

import numpy as np
from PIL import Image

from data_prep import parts, splits
from data_prep.sources import arrays, datasets
from tests.helpers.data_prep import (
    Fork,
    assert_refused,
    photo,
    read,
    run_as_program,
    save,
    wait_for_workers,
    with_companions,
    write,
    write_folder,
)


def test_every_part_of_one_source_says_so_wherever_its_folder_lies(tmp_path, photos, own_photos, monkeypatch):
    monkeypatch.chdir(own_photos)
    (own_photos / "notes.txt").touch()
    roots = {"train": photos, "holdout": own_photos, "test": "."}
    found = [
        write_folder(root, tmp_path / "x.beton", "--subset", n + 5, "--write-mode", mode, split=split)["source"]
        for n, ((split, root), mode) in enumerate(zip(roots.items(), ("raw", "jpg", "raw"), strict=True))
    ]
    digest = hashlib.sha256(b"imagefolder\0")
    for path in sorted(photos.rglob("*.jpg")):
        digest.update(f"{path.parent.name}\0{path.relative_to(photos)}\0".encode())
    assert found == [{"count": 200, "hash": f"sha256:{digest.hexdigest()}"}] * 3
    (own_photos / "ant" / "000.jpg").rename(own_photos / "ant" / "more.jpg")
    changed = write_folder(own_photos, tmp_path / "x.beton", "--subset", 5)["source"]
    assert changed["count"] == 200 and changed["hash"] != found[0]["hash"]


def test_arrays_are_one_source_by_their_labels_and_pixels():
    images, labels = np.arange(24, dtype=np.uint8).reshape(2, 3, 4), np.array([0, 1])

    def source_hash(images=images, labels=labels, where="here", dataset="cifar10"):
        return datasets.source_hash(dataset, arrays.ArraySource(images, labels, ["a", "b"], where))

    assert source_hash() == source_hash(where="there", images=np.asfortranarray(images))
    others = [source_hash(images ^ 1), source_hash(images.reshape(2, 4, 3)), source_hash(labels=labels[::-1])]
    assert len({source_hash(), *others, source_hash(dataset="cifar100")}) == 5


def test_digests_are_of_the_pixels_before_they_are_scaled_or_compressed(tmp_path, photos):
    out, found = tmp_path / "x.beton", {}
    for options in (["--max-resolution", 20], ["--write-mode", "jpg", "--workers", 2], ["--shuffle"]):
        write_folder(photos, out, *options)
        found[options[0]] = np.load(f"{out}.digests.npy")
    pixels = [np.array(Image.open(path)) for path in sorted(photos.rglob("*.jpg"))]
    digests = [hashlib.sha1(struct.pack("<II", *image.shape[:2]) + image.tobytes()).digest()[:8] for image in pixels]
    expected = np.frombuffer(b"".join(digests), "<u8")
    assert found["--shuffle"].dtype == np.uint64
    np.testing.assert_array_equal(found["--max-resolution"], expected)
    np.testing.assert_array_equal(found["--write-mode"], expected)
    np.testing.assert_array_equal(found["--shuffle"], splits.shuffled(expected))


def test_images_that_are_the_same_as_another_of_the_file_are_counted(tmp_path):
    root = tmp_path / "in"
    for name, seed in {"a/0": 0, "a/1": 1, "a/2": 1, "a/3": 2, "b/4": 2, "b/5": 2, "b/6": 3}.items():
        save(root / f"{name}.png", photo(8, 8, seed))
    argv = ["--dataset", "imagefolder", "--root", root, "--split", "test", "--out", tmp_path / "x.beton"]
    assert write(*argv).err.splitlines()[1:] == [
        "warning: 5 images of x.beton are the same as another of it, pixel for pixel, 3 of them with different labels"
    ]
    for copy in ("a/2", "b/4", "b/5"):
        (root / f"{copy}.png").unlink()
    assert write(*argv).err.splitlines()[1:] == []


def test_all_parts_of_a_set_come_of_one_command(tmp_path, imagenet, monkeypatch):
    for path in (imagenet / "train" / "n01440764").iterdir():  # one is held out, two are for training
        shutil.copy(path, imagenet / "val" / "n01440764" / f"copy of {path.name}")
    listed, load = [], datasets.load_source
    monkeypatch.setattr(parts, "load_source", lambda *args: listed.append(args[2]) or load(*args))
    one, each = tmp_path / "one", tmp_path / "each"
    one.mkdir()
    each.mkdir()
    argv = ["--dataset", "imagenet", "--root", imagenet, "--holdout", 0.34, "--write-mode", "proportion"]
    result = write(*argv, "--split", "all", "--out", one)
    assert result.status == 0 and listed == [True, False]
    names = ["holdout.beton", "test.beton", "train.beton"]
    assert [line.split(",")[0] for line in result.out.splitlines()] == [
        f"wrote {one / name}: {count} images" for name, count in zip(names, (2, 5, 4), strict=True)
    ]
    assert [line for line in result.err.splitlines() if "warning" in line] == [
        f"warning: {count} images of {name} are in {other} too, pixel for pixel: they say nothing of new images"
        for count, name, other in ((1, names[0], names[1]), (2, names[1], names[2]))
    ]
    for name in names:
        assert write(*argv, "--split", name.removesuffix(".beton"), "--out", each / name).status == 0
        assert (one / f"{name}.json").read_text() == (each / f"{name}.json").read_text()
        assert (one / f"{name}.digests.npy").read_bytes() == (each / f"{name}.digests.npy").read_bytes()
    assert set(os.listdir(one)) == set(os.listdir(each)) == with_companions(*names)


def test_a_set_has_the_parts_that_there_are(tmp_path, photos, imagenet):
    out, more = tmp_path / "out", tmp_path / "more"
    argv = ["--dataset", "imagefolder", "--root", photos, "--split", "all", "--subset", 5, "--out", out]
    assert_refused(write(*argv), f"error: --out {out}: no folder", f"mkdir -p {out}")
    out.mkdir()
    more.mkdir()
    assert write(*argv).status == 0
    assert set(os.listdir(out)) == with_companions("train.beton", "holdout.beton")
    refused = f"error: --holdout 0.0: train.beton would hold images of {out / 'holdout.beton'}: remove it"
    assert_refused(write(*argv, "--holdout", 0), refused)
    argv = ["--dataset", "imagenet", "--root", imagenet, "--split", "all", "--holdout", 0, "--out", more]
    assert write(*argv).status == 0
    assert set(os.listdir(more)) == with_companions("train.beton", "test.beton")


def test_of_a_set_that_fails_only_whole_parts_of_this_set_are_there(tmp_path, imagenet):
    out = tmp_path / "out"
    out.mkdir()
    argv = ["--dataset", "imagenet", "--root", imagenet, "--split", "all", "--out", out, "--holdout"]
    assert write(*argv, 0.5).status == 0
    before = {path: path.read_bytes() for path in out.iterdir()}
    whole = {path: path.read_bytes() for path in (imagenet / "train" / "n01443537").iterdir()}
    (bad,) = (imagenet / "val" / "n01443537").iterdir()
    for path in (*whole, bad):
        path.write_text("no image")
    assert f"error: {imagenet / 'train' / 'n01443537'}" in write(*argv, 0.34).err  # the first part fails
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    for path, content in whole.items():
        path.write_bytes(content)
    result = write(*argv, 0.34)
    assert result.status == 2 and result.err.splitlines()[-1].startswith(f"error: {bad}: unreadable image")
    assert set(os.listdir(out)) == with_companions("holdout.beton") and len(read(out / "holdout.beton").labels) == 2


def test_ctrl_c_leaves_the_parts_of_a_set_that_are_finished(tmp_path, imagenet):
    for i in range(128):  # the second part's workers wait for ever
        os.mkfifo(imagenet / "val" / "n01443537" / f"{i}.jpg")
    out = tmp_path / "out"
    out.mkdir()
    argv = ["--dataset", "imagenet", "--root", str(imagenet), "--holdout", "0.34", "--workers", "2", "--split", "all"]
    program = Fork(lambda: run_as_program([*argv, "--out", str(out)]), tmp_path / "log")
    try:
        deadline = time.monotonic() + 60
        while not (out / "holdout.beton").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        wait_for_workers(program.process.pid)
        os.kill(program.process.pid, signal.SIGINT)
    finally:
        done = program.wait()
    assert done.status == 130 and done.err.splitlines()[-1] == "interrupted: no unfinished file is left"
    assert done.out.startswith(f"wrote {out / 'holdout.beton'}: 2 images") and done.out.count("\n") == 1
    assert set(os.listdir(out)) == with_companions("holdout.beton")
