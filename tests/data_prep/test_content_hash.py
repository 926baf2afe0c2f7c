"""The content hash: of images and labels alone, and of all of them."""

import hashlib

import numpy as np
import pytest

from tests.helpers.data_prep import (
    photo,
    read,
    save,
    write_folder,
)


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
