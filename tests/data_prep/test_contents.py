"""Datasets to .beton files: what is stored, who is held out, and what happens when something is wrong."""

import gzip
import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from contextlib import redirect_stderr
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from PIL import Image

from data_prep import sources, splits, write_beton, writer
from data_prep.progress import Progress
from tests.helpers.commands import ENVIRONMENT, ROOT
from tests.helpers.data_prep import (
    DEBIAN,
    Fork,
    assert_refused,
    forks,
    idx_images,
    needs_fashion_mnist,
    photo,
    pipes,
    read,
    read_written,
    run_as_program,
    save,
    wait_for_workers,
    with_companions,
    write,
    write_folder,
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 photographs of different sizes in three unequal classes."""
    root = tmp_path_factory.mktemp("photos")
    for name, count in {"ant": 120, "bee": 60, "cat": 20}.items():
        for i in range(count):
            save(root / name / f"{i:03}.jpg", photo(24 + i % 7, 32 + i % 5, seed=1000 * count + i))
    return root


@pytest.fixture
def own_photos(tmp_path: Path, photos: Path) -> Path:
    """Those, to be spoilt."""
    return Path(shutil.copytree(photos, tmp_path / "photos"))


# --- Contents -----------------------------------------------------------------------------------------


@needs_fashion_mnist
def test_fashion_mnist_comes_out_of_an_ffcv_loader_as_it_is_in_the_idx_files(tmp_path):
    out = tmp_path / "test.beton"
    assert write("--dataset", "fashion_mnist", "--split", "test", "--out", out, "--workers", 2).status == 0

    def load() -> None:
        from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
        from ffcv.loader import Loader, OrderOption

        pipelines = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]}
        options = {"batch_size": 1000, "num_workers": 1, "order": OrderOption.SEQUENTIAL, "drop_last": False}
        batches = [(images.copy(), labels.copy()) for images, labels in Loader(out, pipelines=pipelines, **options)]
        images, labels = map(np.concatenate, zip(*batches, strict=True))
        np.savez(tmp_path / "loaded.npz", images=images, labels=labels)

    # A process of its own: FFCV's stock Loader changes numba's types for the whole process.
    done = Fork(load, tmp_path / "load").wait()
    assert done.status == 0, done.err
    loaded = np.load(tmp_path / "loaded.npz")
    images, labels = idx_images("t10k")
    assert loaded["images"].shape == (10000, 28, 28, 3)
    assert (loaded["images"] == images[..., None]).all()
    assert (loaded["labels"][:, 0] == labels).all()


@needs_fashion_mnist
def test_the_json_has_the_agreed_keys_and_true_values(tmp_path):
    out = tmp_path / "part.beton"
    argv = ["--dataset", "fashion_mnist", "--split", "holdout", "--subset", 100, "--out", out]
    assert write(*argv).status == 0
    description = json.loads(Path(f"{out}.json").read_text())
    content_hash = description.pop("content_hash")
    source = description.pop("source")
    assert source.pop("count") == 60_000 and list(source) == ["hash"]
    assert all(text[:7] == "sha256:" and len(bytes.fromhex(text[7:])) == 32 for text in (content_hash, source["hash"]))
    assert description.pop("recipe") == {
        "holdout": 0.1,
        "holdout_seed": splits.HOLDOUT_SEED,
        "subset": 100,
        "subset_seed": splits.SUBSET_SEED,
        "shuffle_seed": None,
        "max_resolution": None,
        "max_pixels": None,
        "integer_range": None,
        "exif_transpose": None,
        "write_mode": "raw",
        "jpeg_quality": None,
        "compress_probability": None,
        "compress_seed": None,
    }
    assert description == {
        "format": 1,
        "dataset": "fashion_mnist",
        "split": "holdout",
        "count": 100,
        "num_classes": 10,
        "classes": sources.FASHION_MNIST_CLASSES,
        "image_size": {"min": [28, 28], "max": [28, 28]},
        "beton_bytes": out.stat().st_size,
        "normalization": {"mean": [0.286] * 3, "std": [0.353] * 3},
    }
    assert np.bincount(read(out).labels).tolist() == [10] * 10
    assert set(os.listdir(tmp_path)) == with_companions("part.beton")


@needs_fashion_mnist
def test_stacked_fashion_mnist_has_every_image_once_and_its_classes_as_digits():
    grey = sources.load_source("fashion_mnist", None, train=False)
    stacked = sources.load_source("stacked_fashion_mnist", None, train=False)
    assert len(stacked) == len(grey) // 3 and len(stacked.classes) == 1000
    assert stacked.classes[387] == "Dress, Bag, Sneaker"
    number = {image.tobytes(): i for i, image in enumerate(grey.images)}  # equal images get one number
    channels = np.moveaxis(stacked.images, 3, 1).reshape(-1, 28, 28)
    used = [number[np.ascontiguousarray(channel).tobytes()] for channel in channels]
    assert len(set(used)) >= len(number) - 1
    digits = grey.labels[used].reshape(-1, 3)
    np.testing.assert_array_equal(digits @ [100, 10, 1], stacked.labels)


@needs_fashion_mnist
def test_fashion_mnist_under_a_root_is_read_from_there(tmp_path):
    root = tmp_path / "mine"
    root.mkdir()
    images = photo(3 * 28, 28, seed=1)[..., 0].reshape(3, 28, 28)
    head = b"\0\0\x08\x03" + np.array([3, 28, 28], ">u4").tobytes()
    (root / "t10k-images-idx3-ubyte").write_bytes(head + images.tobytes())
    (root / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\x03" + bytes([5, 0, 9])))
    argv = ["--dataset", "fashion_mnist", "--root", root, "--split", "test", "--out", tmp_path / "x.beton"]
    assert write(*argv).status == 0
    stored = read(tmp_path / "x.beton")
    assert stored.labels == [5, 0, 9]
    assert (np.stack(stored.images) == images[..., None]).all()


def test_every_kind_of_image_becomes_rgb(tmp_path):
    root = tmp_path / "in"
    rgb = photo(20, 30, seed=1)
    grey, alpha = rgb[..., 0], rgb[..., 1]
    expected = {
        "a/1_rgb.png": rgb,
        "a/2_grey.png": np.repeat(grey[..., None], 3, -1),
        "a/3_rgba.png": rgb,
        "a/deep/er/4_palette.png": None,
        "b/5_16bit.tif": np.repeat(grey[..., None], 3, -1),
        "b/6_bilevel.png": None,
        "b/7_cmyk.JPEG": rgb,
    }
    save(root / "a/1_rgb.png", rgb)
    save(root / "a/2_grey.png", grey)
    save(root / "a/3_rgba.png", np.dstack([rgb, alpha]))
    palette = Image.fromarray(rgb).quantize(200)
    (root / "a/deep/er").mkdir(parents=True)
    palette.save(root / "a/deep/er/4_palette.png", transparency=bytes(range(200)))
    expected["a/deep/er/4_palette.png"] = np.array(palette.convert("RGB"))
    save(root / "b/5_16bit.tif", grey.astype(np.uint16) * 257)
    save(root / "b/6_bilevel.png", grey > 128)
    expected["b/6_bilevel.png"] = np.repeat(np.uint8(255) * (grey > 128)[..., None], 3, -1)
    Image.fromarray(rgb).convert("CMYK").save(root / "b/7_cmyk.JPEG", quality=100, subsampling=0)
    for ignored in ("a/._1_rgb.png", "a/notes.txt", ".git/x.png"):
        (root / ignored).parent.mkdir(exist_ok=True)
        (root / ignored).write_bytes(b"no image")

    description = write_folder(root, tmp_path / "x.beton")
    stored = read(tmp_path / "x.beton")
    assert description["classes"] == ["a", "b"] and stored.labels == [0, 0, 0, 0, 1, 1, 1]
    assert description["normalization"]["mean"] == [0.485, 0.456, 0.406]
    for image, (name, pixels) in zip(stored.images, expected.items(), strict=True):
        tolerance = 6 if "cmyk" in name else 0
        assert np.abs(image.astype(int) - pixels).max() <= tolerance, name


def test_pictures_of_every_suffix_are_taken_and_what_is_left_out_is_said(tmp_path):
    root = tmp_path / "in"
    pixels = np.repeat(photo(16, 16, seed=1)[..., :1], 3, axis=2)
    suffixes = (".apng", ".bmp", ".dib", ".gif", ".JFIF", ".jp2", ".jpe", ".pnm", ".sgi", ".tga", ".tif", ".webp")
    for suffix in suffixes:
        save(root / "a" / f"x{suffix}", pixels)
    save(root / "b" / "DSC_0001", pixels, format="JPEG")
    save(root / "b" / "DSC_0002", pixels, format="PNG")
    for name in ("a/README", "a/notes.txt", "b/list.txt", "b/film.mpg", "b/.DS_Store", "README", "index.csv"):
        (root / name).write_text("no image")
    save(root / "loose.png", pixels)
    os.mkfifo(root / "a" / "pipe")
    (root / "b" / ".thumbnails").mkdir()
    result = write("--dataset", "imagefolder", "--root", root, "--split", "test", "--out", tmp_path / "x.beton")
    assert result.status == 0
    assert result.err.splitlines()[0] == (
        f"imagefolder test: {len(suffixes) + 2} of {len(suffixes) + 2} images, classes: 2; left out: "
        "2 without suffix, 2 .txt, 2 hidden, 1 images beside the class folders, 1 .mpg"
    )
    stored = read(tmp_path / "x.beton")
    assert stored.labels == [0] * len(suffixes) + [1, 1]
    for image in stored.images:
        assert np.abs(image.astype(int) - pixels).mean() < 12


def test_each_real_folder_is_read_once_whatever_links_lead_to_it(tmp_path):
    root = tmp_path / "in"
    for i, name in enumerate(["a/0.png", "a/deep/1.png", "b/2.png", "b/deep/er/3.png"]):
        save(root / name, photo(8, 8, seed=i))
    save(tmp_path / "elsewhere" / "c" / "4.png", photo(8, 8, seed=4))
    for link, target in {"a/self": ".", "a/root": "..", "a/deep/up": "..", "b/deep/twice": "er"}.items():
        (root / link).symlink_to(target)
    (root / "c").symlink_to(tmp_path / "elsewhere" / "c")
    (tmp_path / "elsewhere" / "c" / "out").symlink_to(root)
    result = write("--dataset", "imagefolder", "--root", root, "--split", "test", "--out", tmp_path / "x.beton")
    assert result.err == (
        "imagefolder test: 5 of 5 images, classes: 3; left out: 5 folders linked in a loop or twice\n"
    )
    stored = read(tmp_path / "x.beton")
    assert stored.labels == [0, 0, 1, 1, 2]
    assert {image.tobytes() for image in stored.images} == {photo(8, 8, seed=i).tobytes() for i in range(5)}


def test_each_real_file_is_written_once_whatever_links_lead_to_it(tmp_path):
    root = tmp_path / "in"
    for i, name in enumerate(["a/0.png", "a/1.png", "b/2.png"]):
        save(root / name, photo(8, 8, seed=i))
    os.link(root / "a" / "0.png", root / "a" / "9.png")
    (root / "a" / "8.png").symlink_to("1.png")
    (root / "b" / "3.png").symlink_to(save(tmp_path / "elsewhere.png", photo(8, 8, seed=3)))
    os.link(tmp_path / "elsewhere.png", root / "b" / "4.png")
    result = write("--dataset", "imagefolder", "--root", root, "--split", "test", "--out", tmp_path / "x.beton")
    assert result.err == "imagefolder test: 4 of 4 images, classes: 2; left out: 3 files linked twice\n"
    stored = read(tmp_path / "x.beton")
    assert stored.labels == [0, 0, 1, 1]
    assert [image.tobytes() for image in stored.images] == [photo(8, 8, seed=i).tobytes() for i in range(4)]


def test_thumbnails_and_rubbish_of_file_servers_are_neither_images_nor_classes(tmp_path):
    root = tmp_path / "in"
    for i, folder in enumerate(("a", "b", "@eaDir", "a/@eaDir/0.png", "a/deep/__MACOSX", "lost+found", "$RECYCLE.BIN")):
        save(root / folder / "0.png", photo(8, 8, seed=i))
    (root / "a" / "Thumbs.db").write_bytes(b"no image")
    result = write("--dataset", "imagefolder", "--root", root, "--split", "test", "--out", tmp_path / "x.beton")
    assert result.err == "imagefolder test: 2 of 2 images, classes: 2; left out: 5 system folders, 1 .db\n"
    assert json.loads((tmp_path / "x.beton.json").read_text())["classes"] == ["a", "b"]


def test_integers_of_more_than_8_bits_are_scaled_from_the_range_that_is_known(tmp_path):
    grey = np.arange(256).reshape(16, 16)
    known, told = tmp_path / "known", tmp_path / "told"
    save(known / "a" / "0.png", (grey * 257).astype(np.uint16))
    save(known / "a" / "1.tif", (grey * 257 + 100).clip(0, 65535).astype(np.uint16))
    (known / "a" / "2.pgm").write_bytes(b"P5 16 16 4095\n" + (grey * 4095 // 255).astype(">u2").tobytes())
    (known / "a" / "3.tif").write_bytes(twelve_bit_tiff((grey * 4095 + 127) // 255))
    for number, image in enumerate(read_written(known, tmp_path / "x.beton").images):
        assert np.abs(image - grey[..., None]).max() <= (number == 2), number
    save(told / "a" / "0.png", grey.astype(np.uint16))
    save(told / "a" / "1.tif", grey.astype(np.int32))
    save(told / "a" / "2.png", np.zeros((16, 16), np.uint16))
    shutil.copy(known / "a" / "2.pgm", told / "a" / "3.pgm")  # which tells its range itself
    assert write_folder(told, tmp_path / "x.beton", "--integer-range", 255)["recipe"]["integer_range"] == 255
    stored = read(tmp_path / "x.beton").images
    assert all((image == grey[..., None]).all() for image in stored[:2]) and not stored[2].any()
    assert np.abs(stored[3] - grey[..., None]).max() <= 1


def twelve_bit_tiff(pixels: np.ndarray) -> bytes:
    """A TIFF of 12-bit grey, which PIL reads but does not write. pixels: int [height, width], an even width."""
    height, width = pixels.shape
    low, high = pixels[:, ::2], pixels[:, 1::2]
    data = np.stack([low >> 4, (low & 15) << 4 | high >> 8, high & 255], -1).astype(np.uint8).tobytes()
    tags = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize(
    "pixels, name, options, mend",
    [
        (np.uint16([[0, 255]]), "x.png", [], "integer pixels up to 255, and nothing says which value is white"),
        (np.uint16([[0, 4095]]), "x.png", [], "--integer-range 4095"),
        (np.uint16([[0, 30000]]), "x.tif", [], "--integer-range 65535"),
        (np.int32([[0, 255]]), "x.tif", [], "--integer-range 255"),
        (np.int32([[0, 65535]]), "x.tif", [], "--integer-range 65535"),
        (np.int32([[0, 1 << 20]]), "x.tif", [], "--integer-range 1048576"),
        (np.int32([[-1, 255]]), "x.tif", ["--integer-range", 255], "pixels down to -1"),
        (np.uint16([[0, 4096]]), "x.png", ["--integer-range", 4095], "up to 4096, beyond --integer-range 4095"),
        ("PNG of 16-bit colour, 0 to 4095", "x.png", [], "--integer-range 65535"),
    ],
)
def test_integers_of_unknown_range_are_refused_with_the_option_that_tells_it(tmp_path, pixels, name, options, mend):
    path = tmp_path / "in" / "a" / name
    if isinstance(pixels, str):
        import cv2

        path.parent.mkdir(parents=True)
        cv2.imwrite(str(path), np.full((4, 4, 3), 4095, np.uint16))
    else:
        save(path, pixels)
    argv = ["--dataset", "imagefolder", "--root", tmp_path / "in", "--split", "test", "--out", tmp_path / "x.beton"]
    assert_refused(write(*argv, *options), f"error: {path}: ", mend)


def test_pictures_beyond_the_limit_are_decoded_at_a_reduced_scale_where_that_is_possible(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # PIL's own limit, which is not asked
    root, out = tmp_path / "in", tmp_path / "x.beton"
    for i, size in enumerate([(300, 201), (201, 300), (300, 299)]):
        save(root / "a" / f"{i}.jpg", photo(*size, seed=i), quality=95)
    whole = read_written(root, out, "--max-resolution", 47).images
    written = write_folder(root, out, "--max-resolution", 47, "--max-pixels", 10_000)
    assert written["recipe"]["max_pixels"] == 10_000
    assert written["image_size"] == {"min": [31, 31], "max": [47, 47]}
    for ours, reference in zip(read(out).images, whole, strict=True):
        assert ours.shape == reference.shape and (ours != reference).any()
        assert np.abs(ours.astype(int) - reference).mean() < 3
    # The limit alone decides, and below it nothing changes.
    assert all((a == b).all() for a, b in zip(
        read_written(root, out, "--max-resolution", 47, "--max-pixels", 90_000).images, whole, strict=True
    ))  # fmt: skip

    argv = ["--dataset", "imagefolder", "--root", root, "--split", "test", "--out", out, "--max-pixels", 10_000]
    refused = f"error: {root / 'a' / '0.jpg'}: 300 x 201 pixels, more than --max-pixels 10000"
    assert_refused(write(*argv, "--write-mode", "jpg"), refused, "raise that to 60300", "smaller --max-resolution")
    assert_refused(write(*argv, "--max-resolution", 200), refused, "raise that to 60300", "smaller --max-resolution")
    png = save(root / "a" / "0.png", photo(300, 201, seed=3))
    png.write_bytes(png.read_bytes()[:100])  # the header tells
    (root / "a" / "0.jpg").unlink()
    refused = f"error: {png}: 300 x 201 pixels, more than --max-pixels 10000"
    assert_refused(write(*argv, "--max-resolution", 47), refused, "raise that to 60300")


def test_exif_orientation_is_ignored_unless_asked_for(tmp_path):
    root, out = tmp_path / "in", tmp_path / "x.beton"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    path = save(root / "a" / "x.jpg", photo(160, 120, seed=1), exif=exif)
    pixels = np.array(Image.open(path))
    save(root / "a" / "y.tif", pixels, exif=exif)  # PIL turns these by itself
    straight, turned = read_written(root, out).images
    assert (straight == pixels).all() and (turned == np.rot90(pixels, -1)).all()
    assert write_folder(root, out, "--exif-transpose")["recipe"]["exif_transpose"] is True
    assert all((image == np.rot90(pixels, -1)).all() for image in read(out).images)
    (root / "a" / "y.tif").unlink()
    reduced = read_written(root, out, "--exif-transpose", "--max-pixels", 5000, "--max-resolution", 40).images[0]
    straight = read_written(root, out, "--max-pixels", 5000, "--max-resolution", 40).images[0]
    assert reduced.shape == (30, 40, 3) and (reduced == np.rot90(straight, -1)).all()


def test_image_sizes_are_those_stored(tmp_path):
    root = tmp_path / "in"
    save(root / "a/tall.png", photo(90, 40, seed=1))
    save(root / "a/wide.png", photo(30, 60, seed=2))
    assert write_folder(root, tmp_path / "x.beton")["image_size"] == {"min": [30, 40], "max": [90, 60]}
    scaled = write_folder(root, tmp_path / "y.beton", "--max-resolution", 45)
    assert scaled["image_size"] == {"min": [22, 20], "max": [45, 45]}
    assert [image.shape for image in read(tmp_path / "y.beton").images] == [(45, 20, 3), (22, 45, 3)]


def test_an_image_larger_than_a_page_is_refused_until_max_resolution_allows_it(tmp_path):
    root = tmp_path / "in"
    pixels = np.zeros((1700, 1690, 3), np.uint8)
    pixels[::7, ::5] = 200
    huge = save(root / "a/huge.png", pixels)
    whole = huge.read_bytes()
    huge.write_bytes(whole[:100])  # the header tells
    argv = ["--dataset", "imagefolder", "--root", root, "--split", "test", "--out", tmp_path / "x.beton"]
    result = write(*argv)
    assert result.status == 2
    assert result.err.splitlines()[-1].startswith(f"error: {huge}: 1700 x 1690 pixels take 8,619,000 bytes")
    assert "--max-resolution 1672" in result.err and "--max-resolution 1700" in result.err
    assert os.listdir(tmp_path) == ["in"]
    huge.write_bytes(whole)
    assert write_folder(root, tmp_path / "x.beton", "--max-resolution", 1700)["image_size"]["max"] == [1700, 1690]
    assert (read(tmp_path / "x.beton").images[0] == pixels).all()


# --- Splits and subsets -------------------------------------------------------------------------------


@needs_fashion_mnist
def test_holdout_takes_its_fraction_of_every_class_and_stays_the_same():
    labels = sources.read_idx(DEBIAN / "train-labels-idx1-ubyte.gz").astype(np.int64)
    held_out = splits.holdout_indices(labels, 0.1, 10)
    assert np.bincount(labels[held_out]).tolist() == [600] * 10
    assert len(np.unique(held_out)) == 6000
    # Files written by different versions must agree about who is held out: never change this.
    digest = hashlib.sha256(held_out.astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == "54a339b4b605536f"


def test_train_and_holdout_share_no_image_and_together_are_the_training_set(tmp_path, photos):
    parts = {}
    for split, options in {"train": [], "holdout": ["--write-mode", "raw", "--workers", 1]}.items():
        write_folder(photos, tmp_path / f"{split}.beton", "--holdout", 0.15, *options, split=split)
        parts[split] = read(tmp_path / f"{split}.beton")
    assert np.bincount(parts["train"].labels).tolist() == [102, 51, 17]
    assert np.bincount(parts["holdout"].labels).tolist() == [18, 9, 3]
    write_folder(photos, tmp_path / "whole.beton", "--holdout", 0, split="train")
    whole = read(tmp_path / "whole.beton")
    assert len(whole.images) == 200

    def keys(part):
        return [(label, image.tobytes()) for image, label in zip(part.images, part.labels, strict=True)]

    assert len(set(keys(whole))) == 200
    assert sorted(keys(parts["train"]) + keys(parts["holdout"])) == sorted(keys(whole))


def test_the_same_images_are_held_out_whatever_the_other_options(tmp_path, photos):
    write_folder(photos, tmp_path / "a.beton", split="holdout")
    write_folder(
        photos,
        tmp_path / "b.beton",
        "--write-mode",
        "jpg",
        "--jpeg-quality",
        95,
        "--workers",
        3,
        split="holdout",
    )
    a, b = read(tmp_path / "a.beton"), read(tmp_path / "b.beton")
    assert a.labels == b.labels and all(b.jpeg) and not any(a.jpeg)
    for raw, jpeg in zip(a.images, b.images, strict=True):
        assert np.abs(raw.astype(int) - jpeg).mean() < 6


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.99])
def test_holdout_is_stratified_to_within_one_image_and_leaves_every_class_one(fraction):
    counts = np.array([1, 2, 3, 7, 50, 333])
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(6), counts))
    taken = np.bincount(labels[splits.holdout_indices(labels, fraction, 6)], minlength=6)
    assert (np.abs(taken - counts * fraction) <= 1).all()
    assert (taken < counts).all()


def test_a_shuffled_file_has_the_same_images_in_an_order_of_its_own(tmp_path, photos):
    plain, shuffled = (
        read_written(photos, tmp_path / f"{n}.beton", *more) for n, more in enumerate(([], ["--shuffle"]))
    )
    again = read_written(photos, tmp_path / "again.beton", "--shuffle", "--workers", 3)
    assert (np.diff(plain.labels) >= 0).all() and (np.diff(shuffled.labels) < 0).sum() > 20
    pairs = [sorted((image.tobytes(), label) for image, label in zip(file.images, file.labels, strict=True))
             for file in (plain, shuffled)]  # fmt: skip
    assert pairs[0] == pairs[1]
    assert [image.tobytes() for image in again.images] == [image.tobytes() for image in shuffled.images]


def test_a_subset_is_balanced_as_far_as_the_classes_reach_and_grows_by_addition(tmp_path, photos):
    write_folder(photos, tmp_path / "a.beton", "--subset", 90)
    write_folder(photos, tmp_path / "b.beton", "--subset", 91)
    a, b = read(tmp_path / "a.beton"), read(tmp_path / "b.beton")
    assert np.bincount(a.labels).tolist() == [35, 35, 20]
    assert np.bincount(b.labels).tolist() == [36, 35, 20]
    assert {image.tobytes() for image in a.images} < {image.tobytes() for image in b.images}
    labels = np.repeat(np.arange(5), 10)
    assert len(splits.balanced_subset(labels, 3, 5)) == 3
    assert splits.balanced_subset(labels, 50, 5).tolist() == list(range(50))


# --- Sets of parts, and what they are parts of --------------------------------------------------------


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
        return sources.source_hash(dataset, sources.ArraySource(images, labels, ["a", "b"], where))

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
    listed, load = [], sources.load_source
    monkeypatch.setattr(write_beton, "load_source", lambda *args: listed.append(args[2]) or load(*args))
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


# --- Layouts ------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_imagenet(tmp_path: Path) -> Path:
    root = tmp_path / "tiny-imagenet-200"
    wnids = ["n03", "n01", "n02"]
    for wnid in wnids:
        for i in range(2):
            save(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", photo(64, 64, seed=int(wnid[1:]) + i))
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
    lines = []
    for i, wnid in enumerate(["n02", "n02", "n03", "n01"]):
        save(root / "val" / "images" / f"val_{i}.JPEG", photo(64, 64, seed=50 + i))
        lines.append(f"val_{i}.JPEG\t{wnid}\t0\t0\t63\t63\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("\n".join(wnids) + "\n")
    (root / "words.txt").write_text("n00\tentity\nn01\ttench, Tinca tinca\nn02\tgoldfish\n")
    return root


def test_tiny_imagenet_reads_its_official_layout_and_numbers_train_and_test_alike(tmp_path, tiny_imagenet):
    argv = ["--dataset", "tiny_imagenet", "--root", tiny_imagenet, "--holdout", 0, "--split"]
    for split, labels in {"train": [0, 0, 1, 1, 2, 2], "test": [1, 1, 2, 0]}.items():
        out = tmp_path / f"{split}.beton"
        assert write(*argv, split, "--out", out).status == 0
        assert read(out).labels == labels
        description = json.loads(Path(f"{out}.json").read_text())
        assert description["classes"] == ["tench, Tinca tinca", "goldfish", "n03"]
        assert description["image_size"] == {"min": [64, 64], "max": [64, 64]}
    first = np.array(Image.open(tiny_imagenet / "val" / "images" / "val_0.JPEG"))
    assert (read(tmp_path / "test.beton").images[0] == first).all()


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    root = tmp_path / "imagenet"
    for split, count in (("train", 3), ("val", 1)):
        for label, wnid in enumerate(("n01440764", "n01443537")):
            for i in range(count):
                pixels = photo(40 + i, 50, seed=100 * count + 10 * label + i)
                save(root / split / wnid / f"{wnid}_{i}.JPEG", pixels)
    return root


def test_imagenet_reads_train_and_val(tmp_path, imagenet):
    argv = ["--dataset", "imagenet", "--root", imagenet, "--holdout", 0, "--split"]
    for split, labels in {"train": [0, 0, 0, 1, 1, 1], "test": [0, 1]}.items():
        out = tmp_path / f"{split}.beton"
        assert write(*argv, split, "--out", out, "--write-mode", "jpg").status == 0
        assert read(out).labels == labels
        assert json.loads(Path(f"{out}.json").read_text())["classes"] == ["n01440764", "n01443537"]


@pytest.fixture
def cifar100(tmp_path: Path, request, monkeypatch) -> SimpleNamespace:
    """Three images in CIFAR-100's own format, which torchvision takes for the real ones; their labels by parameter."""
    from torchvision.datasets import CIFAR100

    folder = tmp_path / "data" / CIFAR100.base_folder
    folder.mkdir(parents=True)
    pixels = np.stack([photo(32, 32, seed=i) for i in range(3)])
    files = {
        "train": {
            "data": pixels.transpose(0, 3, 1, 2).reshape(3, -1),
            "fine_labels": getattr(request, "param", [0, 99, 1]),
        },
        "meta": {"fine_label_names": [f"class {i}" for i in range(100)]},
    }
    md5 = {}
    for name, content in files.items():
        (folder / name).write_bytes(pickle.dumps(content))
        md5[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR100, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": md5["meta"]})
    monkeypatch.setattr(CIFAR100, "url", "file:///nowhere/cifar-100-python.tar.gz")
    return SimpleNamespace(root=tmp_path / "data", pixels=pixels, meta=folder / "meta")


def test_cifar_is_read_through_torchvision_with_the_papers_constants(tmp_path, cifar100):
    out = tmp_path / "x.beton"
    argv = [
        "--dataset",
        "cifar100",
        "--root",
        cifar100.root,
        "--split",
        "train",
        "--holdout",
        0,
        "--out",
        out,
    ]
    assert write(*argv).status == 0
    assert (np.stack(read(out).images) == cifar100.pixels).all()
    assert read(out).labels == [0, 99, 1]
    description = json.loads(Path(f"{out}.json").read_text())
    assert description["num_classes"] == 100 and description["classes"][99] == "class 99"
    assert description["normalization"] == {"mean": [0.5071, 0.4867, 0.4408], "std": [0.2675, 0.2565, 0.2761]}


@pytest.mark.parametrize("cifar100", [[0, 100, 1], [0, 99, -1], [0, 99]], indirect=True)
def test_a_label_that_no_class_covers_is_never_written(tmp_path, cifar100):
    out = tmp_path / "x.beton"
    result = write("--dataset", "cifar100", "--root", cifar100.root, "--split", "train", "--out", out)
    assert_refused(result, f"error: {cifar100.root}: ", "get")
    assert os.listdir(tmp_path) == ["data"]


def test_a_failed_download_is_one_line(tmp_path, cifar100):
    cifar100.meta.unlink()
    out = tmp_path / "x.beton"
    result = write("--dataset", "cifar100", "--root", cifar100.root, "--split", "train", "--out", out)
    assert_refused(result, f"error: --root {cifar100.root}: CIFAR100 is not there whole", "download failed")
    assert os.listdir(tmp_path) == ["data"]


# --- Content hash -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["raw", "jpg", "proportion"])
def test_content_hash_does_not_depend_on_workers_or_on_the_roll_of_dice(tmp_path, photos, mode):
    hashes = {
        write_folder(photos, tmp_path / "x.beton", "--write-mode", mode, "--workers", workers)["content_hash"]
        for workers in (1, 2, 4)
    }
    assert len(hashes) == 1
    assert 0.3 < np.mean(read(tmp_path / "x.beton").jpeg) < 0.7 or mode != "proportion"


def test_content_hash_can_be_computed_from_what_is_documented(tmp_path, photos):
    written = write_folder(photos, tmp_path / "x.beton", "--subset", 20)["content_hash"]
    digest = hashlib.sha256()
    stored = read(tmp_path / "x.beton")
    for image, label in zip(stored.images, stored.labels, strict=True):
        height, width, _ = image.shape
        for number, size in ((label, 8), (height, 2), (width, 2), (1, 1), (image.size, 8)):
            digest.update(number.to_bytes(size, "little"))
        digest.update(image.tobytes())
    assert written == f"sha256:{digest.hexdigest()}"


def test_content_hash_changes_with_a_pixel_a_label_and_the_quality(tmp_path):
    root = tmp_path / "in"
    for i in range(6):
        save(root / "ab"[i // 3] / f"{i}.png", photo(16, 16, seed=i))
    out = tmp_path / "x.beton"
    seen = [write_folder(root, out)["content_hash"]]
    pixels = photo(16, 16, seed=2)
    pixels[7, 7, 1] ^= 1
    save(root / "a" / "2.png", pixels)
    seen.append(write_folder(root, out)["content_hash"])
    (root / "a" / "2.png").rename(root / "b" / "2.png")  # same images in the same order, another label
    seen.append(write_folder(root, out)["content_hash"])
    for quality in (90, 91):
        options = ["--write-mode", "jpg", "--jpeg-quality", quality]
        seen.append(write_folder(root, out, *options)["content_hash"])
    assert len(set(seen)) == 5


@pytest.mark.parametrize(
    "option, value, mend",
    [
        ("--holdout", "1", "from 0 to below 1"),
        ("--holdout", "0", "above 0"),
        ("--holdout", "nan", "from 0 to below 1"),
        ("--subset", "0", "1 or more"),
        ("--subset", "21", "split holdout has 20 images only"),
        ("--max-resolution", "0", "from 1 to 65535"),
        ("--jpeg-quality", "101", "from 1 to 100"),
        ("--compress-probability", "1.5", "from 0 to 1"),
        ("--workers", "0", "1 or more"),
        ("--out", "x.bin", "ends in .beton"),
        ("--out", "nowhere/x.beton", "mkdir -p nowhere"),
        ("--root", "nowhere", "no such folder"),
    ],
)
def test_a_bad_option_is_one_line_that_names_it_and_the_mend(tmp_path, photos, monkeypatch, option, value, mend):
    monkeypatch.chdir(tmp_path)
    argv = {"--dataset": "imagefolder", "--root": str(photos), "--split": "holdout", "--out": "x.beton"}
    argv[option] = value
    assert_refused(write(*(word for pair in argv.items() for word in pair)), f"error: {option} {value}", mend)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("argv", [[], ["--dataset", "mnist"], ["--nonsense"], ["--subset", "many"]])
def test_a_wrong_command_line_is_one_line(argv):
    assert_refused(write(*argv), "error: ")


def test_a_folder_that_is_not_writable_is_refused(tmp_path, photos):
    (tmp_path / "ours").mkdir(mode=0o555)
    out = tmp_path / "ours" / "x.beton"
    # Root may write everywhere, unless it gives that capability away.
    plain_user = ["setpriv", "--inh-caps=-dac_override", "--bounding-set=-dac_override"] if os.geteuid() == 0 else []
    command = [
        *plain_user,
        sys.executable,
        "-m",
        "data_prep.write_beton",
        "--dataset",
        "imagefolder",
        "--split",
        "test",
    ]
    done = subprocess.run([*command, "--root", photos, "--out", out], cwd=ROOT, capture_output=True, text=True)
    result = SimpleNamespace(status=done.returncode, out=done.stdout, err=done.stderr)
    assert_refused(result, f"error: --out {out}: Permission denied")


def spoil_layout(case: str, root: Path) -> tuple[str, str]:
    """Breaks a layout; returns the start of the message and a part of its rest."""
    if case == "imagefolder without classes":
        for folder in root.iterdir():
            folder.rename(folder.with_name("." + folder.name))
        return f"error: --root {root}: no class folders", "<class>"
    if case == "imagefolder of splits":
        for folder, name in zip(sorted(root.iterdir()), ("test", "train", "val"), strict=True):
            folder.rename(folder.with_name(name))
        return f"error: --root {root}: its folders are splits", f"--root {root}/test"
    if case == "imagefolder with an empty class":
        (root / "dog" / "deeper").mkdir(parents=True)
        return f"error: {root}/dog: a class without images", "remove the folder"
    if case == "imagefolder with a folder in two classes":
        (root / "bee" / "more").symlink_to(root / "ant")
        return f"error: {root}/bee/more: the same folder is below {root}/ant, another class", "remove the link"
    if case == "imagefolder with a file in two classes":
        os.link(root / "ant" / "007.jpg", root / "cat" / "more.jpg")
        return f"error: {root}/cat/more.jpg: the same file as {root}/ant/007.jpg, of another class", "remove one"
    if case == "imagefolder with a loop for a class":
        (root / "dog").symlink_to(".")
        return f"error: {root}/dog: a class without images (1 folders linked in a loop or twice)", "remove the folder"
    if case == "imagenet without val":
        (root / "val").rename(root / "validation")
        return f"error: --root {root}: no folder val/", f"{root}/val/<wnid>/*.JPEG"
    if case == "imagenet with a flat val":
        for wnid in list((root / "val").iterdir()):
            next(wnid.iterdir()).rename(root / "val" / f"{wnid.name}.JPEG")
            wnid.rmdir()
        return f"error: {root}/val: no class folders", f"{root}/val/<wnid>/*.JPEG"
    if case == "imagenet with another class in val":
        (root / "val" / "n01440764").rename(root / "val" / "n99999999")
        return f"error: --root {root}: train/ and val/ hold different classes (2, e.g. n01440764)", "layout"
    if case == "tiny_imagenet without wnids":
        (root / "wnids.txt").unlink()
        return f"error: {root}/wnids.txt: No such file", "official layout"
    if case == "tiny_imagenet without annotations":
        (root / "val" / "val_annotations.txt").unlink()
        return f"error: {root}/val/val_annotations.txt: No such file", "official layout"
    if case == "tiny_imagenet with an unknown class":
        (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn77\t0\t0\t1\t1\n")
        return f"error: {root}/val/val_annotations.txt: no class of wnids.txt", "n77"
    if case == "tiny_imagenet with a listed image missing":
        (root / "val" / "images" / "val_2.JPEG").unlink()
        return f"error: {root}/val/images/val_2.JPEG: unreadable image (No such file", "repair"
    raise AssertionError(case)


@pytest.mark.parametrize(
    "case",
    [
        "imagefolder without classes",
        "imagefolder of splits",
        "imagefolder with an empty class",
        "imagefolder with a folder in two classes",
        "imagefolder with a file in two classes",
        "imagefolder with a loop for a class",
        "imagenet without val",
        "imagenet with a flat val",
        "imagenet with another class in val",
        "tiny_imagenet without wnids",
        "tiny_imagenet without annotations",
        "tiny_imagenet with an unknown class",
        "tiny_imagenet with a listed image missing",
    ],
)
def test_a_wrong_layout_is_one_line_that_says_the_right_one(tmp_path, request, case):
    dataset = case.split()[0]
    root = request.getfixturevalue("own_photos" if dataset == "imagefolder" else dataset)
    start, mend = spoil_layout(case, root)
    out = tmp_path / "x.beton"
    assert_refused(write("--dataset", dataset, "--root", root, "--split", "test", "--out", out), start, mend)
    assert os.listdir(tmp_path) == [root.name]


def spoil_image(case: str, path: Path) -> str:
    """Breaks an image file; returns the reason that the message gives."""
    if case == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
        return "truncated"
    if case == "empty":
        path.write_bytes(b"")
        return "cannot identify"
    if case == "text":
        path.write_text("<html>404</html>")
        return "cannot identify"
    if case == "floating point":
        Image.fromarray(np.zeros((4, 4), np.float32)).save(path, format="tiff")
        return "floating-point"
    path.unlink()
    path.symlink_to("gone.jpg")
    return "No such file"


@pytest.mark.parametrize("case", ["truncated", "empty", "text", "floating point", "dangling link"])
def test_an_unreadable_image_is_named_and_the_old_files_stay(tmp_path, own_photos, case):
    out = tmp_path / "x.beton"
    write_folder(own_photos, out, "--subset", 10)
    before = {tmp_path / name: (tmp_path / name).read_bytes() for name in with_companions("x.beton")}
    bad = own_photos / "bee" / "031.jpg"
    reason = spoil_image(case, bad)
    argv = ["--dataset", "imagefolder", "--root", own_photos, "--split", "test", "--out", out, "--workers", 3]
    assert_refused(write(*argv), f"error: {bad}: unreadable image (", reason, "repair or remove it")
    assert {path: path.read_bytes() for path in before} == before
    assert set(os.listdir(tmp_path)) == {"photos"} | with_companions("x.beton")


@needs_fashion_mnist
@pytest.mark.parametrize("file", ["t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"])
def test_a_damaged_idx_file_is_named(tmp_path, file):
    root = tmp_path / "fashion"
    root.mkdir()
    for name in ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"):
        content = (DEBIAN / name).read_bytes()
        (root / name).write_bytes(content[:-1000] if name == file else content)
    argv = ["--dataset", "fashion_mnist", "--root", root, "--split", "test", "--out", tmp_path / "x.beton"]
    assert_refused(write(*argv), f"error: {root / file}: cannot be read")


@pytest.mark.parametrize("room_again", [False, True])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, photos, monkeypatch, room_again):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    run_workers = writer._run_workers

    def run_short_of_room(*args) -> None:
        # Cuts the only page short, which the system reports as a partial write and FFCV overlooks.
        resource.setrlimit(resource.RLIMIT_FSIZE, (12 << 20, limits[1]))
        run_workers(*args)
        if room_again:  # before the parent's own writes could fail
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(writer, "_run_workers", run_short_of_room)
    argv = ["--dataset", "imagefolder", "--root", photos, "--split", "test", "--out", tmp_path / "x.beton"]
    try:
        result = write(*argv, "--workers", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_refused(result, "error: --out: ", f"in {tmp_path}: free some space")
    assert os.listdir(tmp_path) == []


# --- Files and processes ------------------------------------------------------------------------------


def test_a_beton_never_stands_beside_the_json_or_the_digests_of_another(tmp_path, photos, monkeypatch):
    out = tmp_path / "x.beton"
    write_folder(photos, out, "--subset", 10)
    states = []

    def replace(path: Path, target: Path) -> None:
        os.replace(path, target)
        states.append({
            path.name: count(path)
            for path, count in (
                (out, lambda path: len(read(path).labels)),
                (Path(f"{out}.json"), lambda path: json.loads(path.read_text())["count"]),
                (Path(f"{out}.digests.npy"), lambda path: len(np.load(path))),
            )
            if path.exists()
        })  # fmt: skip

    monkeypatch.setattr(Path, "replace", replace)
    write_folder(photos, out, "--subset", 20)
    assert {value for state in states for value in state.values()} == {20}
    assert [out.name in state for state in states] == [False, False, True] and len(states[-1]) == 3


def test_a_killed_worker_ends_the_program_with_one_line(tmp_path):
    known, workers = frozenset(forks(os.getpid())), []

    def kill_one() -> None:
        workers.extend(wait_for_workers(os.getpid(), known))
        os.kill(workers[1], signal.SIGKILL)
        if not ended.wait(20):  # hangs: let it fail instead
            os.kill(workers[0], signal.SIGKILL)

    ended = threading.Event()
    killer = threading.Thread(target=kill_one)
    killer.start()
    result = write(*pipes(tmp_path))
    in_time = killer.is_alive()
    ended.set()
    killer.join()
    assert in_time
    assert_refused(result, "error: --workers: a writer process died (SIGKILL)", "fewer workers")
    assert os.listdir(tmp_path / "out") == []
    assert not any(psutil.pid_exists(worker) for worker in workers)


def test_a_signal_while_workers_are_forked_is_not_lost(tmp_path):
    argv = pipes(tmp_path)

    def run_with_signal() -> None:
        os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGTERM))
        run_as_program(argv)

    done = Fork(run_with_signal, tmp_path / "log").wait()
    assert done.status == 128 + signal.SIGTERM
    assert done.err == "imagefolder test: 128 of 128 images, classes: 1\n" and done.out == ""
    assert os.listdir(tmp_path / "out") == []


def test_sigterm_ends_the_workers_and_leaves_no_files(tmp_path):
    argv = pipes(tmp_path)
    program = Fork(lambda: run_as_program(argv), tmp_path / "log")
    try:
        workers = wait_for_workers(program.process.pid)
        assert len(os.listdir(tmp_path / "out")) == 1  # the temporary file
        program.process.terminate()
    finally:
        done = program.wait()
    assert done.status == 128 + signal.SIGTERM
    assert done.err == "imagefolder test: 128 of 128 images, classes: 1\n" and done.out == ""
    assert os.listdir(tmp_path / "out") == []
    assert not any(psutil.pid_exists(worker) for worker in workers)


def test_what_a_killed_writer_left_goes_at_the_next_write_and_that_of_a_living_one_stays(tmp_path, photos):
    os.mkfifo(tmp_path / "wnids.txt")  # keeps its readers waiting
    out = tmp_path / "out" / "x.beton"
    out.parent.mkdir()
    command = [sys.executable, "-m", "data_prep.write_beton", "--dataset", "tiny_imagenet", "--split", "test"]
    writers, files = [], []
    for _ in range(2):
        writers.append(subprocess.Popen([*command, "--root", tmp_path, "--out", out], cwd=ROOT, env=ENVIRONMENT))
        while len(names := set(os.listdir(out.parent)) - set(files)) < 1:
            time.sleep(0.01)
        files += names
    try:
        time.sleep(0.1)  # its lock comes right after its file
        writers[0].kill()
        writers[0].wait()
        for kind in ("json", "digests"):  # as if it had come that far
            (out.parent / files[0].replace("data", kind)).touch()
        write_folder(photos, out, "--subset", 5)
        assert set(os.listdir(out.parent)) == with_companions("x.beton") | {files[1]}
        writers[1].terminate()
        assert writers[1].wait(20) == 128 + signal.SIGTERM
        assert set(os.listdir(out.parent)) == with_companions("x.beton")
    finally:
        for writer_ in writers:
            writer_.kill()


def test_names_are_utf8_whatever_the_locale(tmp_path):
    folder = tmp_path / "é"
    for name in ("Zebra", "ä", os.fsdecode(b"\xff")):
        save(folder / "in" / name / "ö.png", photo(8, 8, seed=1))
    here = write_folder(folder / "in", folder / "here.beton")
    # Python then takes ASCII for names and texts; the encoding of stdout is that of a terminal which shows no more.
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "data_prep.write_beton", "--dataset", "imagefolder", "--split", "test"]
    command += ["--root", folder / "in", "--out", folder / "there.beton"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT | locale, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "there.beton: 3 images" in done.stdout
    there = json.loads((folder / "there.beton.json").read_text(encoding="utf-8"))
    assert there["classes"] == ["Zebra", "ä", "\\xff"]
    assert there == here


def test_help_shows_examples_without_importing_torch():
    script = (
        "import sys, data_prep.write_beton as w\n"
        "try: w.main(['--help'])\n"
        "except SystemExit: sys.exit('torch' in sys.modules or 'ffcv' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    examples = [line for line in done.stdout.splitlines() if line.startswith("  python -m data_prep.write_beton --")]
    assert len(examples) >= 6
    for example in examples:
        write_beton_options = example.split()[3:]
        assert "--dataset" in write_beton_options and "--out" in write_beton_options


def test_progress_redraws_one_line_on_a_terminal_and_writes_few_lines_elsewhere(monkeypatch):
    clock = iter(np.arange(0, 10_000, 0.05))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))

    def show(terminal: bool) -> str:
        with redirect_stderr(io.StringIO()) as screen:
            screen.isatty = lambda: terminal
            with Progress("writing", 1000) as progress:
                for done in range(1, 1001):
                    progress.update(done)
        return screen.getvalue()

    terminal, log = show(True), show(False)
    assert terminal.count("\n") == 1 and terminal.count("\r") > 100
    assert "[####################] 100 %  1,000/1,000 images" in terminal
    assert "\r" not in log and 3 <= log.count("\n") <= 6
    assert "images/s" in log and " left" in log
