"""Pixels: integers of more than 8 bits, images beyond a limit, EXIF orientation, stored sizes."""

import os
import shutil
import struct

import numpy as np
import pytest
from PIL import Image

from tests.helpers.data_prep import (
    assert_refused,
    photo,
    read,
    read_written,
    save,
    write,
    write_folder,
)


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
