"""Datasets to .beton files: what is stored."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep import splits
from data_prep.sources import arrays, datasets
from tests.helpers.data_prep import (
    Fork,
    idx_images,
    needs_fashion_mnist,
    photo,
    read,
    save,
    with_companions,
    write,
    write_folder,
)


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
    assert description.pop("labels") is True
    assert description == {
        "format": 1,
        "dataset": "fashion_mnist",
        "split": "holdout",
        "count": 100,
        "num_classes": 10,
        "classes": arrays.FASHION_MNIST_CLASSES,
        "image_size": {"min": [28, 28], "max": [28, 28]},
        "beton_bytes": out.stat().st_size,
        "normalization": {"mean": [0.286] * 3, "std": [0.353] * 3},
    }
    assert np.bincount(read(out).labels).tolist() == [10] * 10
    assert set(os.listdir(tmp_path)) == with_companions("part.beton")


@needs_fashion_mnist
def test_stacked_fashion_mnist_has_every_image_once_and_its_classes_as_digits():
    grey = datasets.load_source("fashion_mnist", None, train=False)
    stacked = datasets.load_source("stacked_fashion_mnist", None, train=False)
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
