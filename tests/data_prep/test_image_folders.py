"""Which files of an image folder are images, each of them once, whatever links lead to it."""

import json
import os

import numpy as np

from tests.helpers.data_prep import (
    photo,
    read,
    save,
    write,
)


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
