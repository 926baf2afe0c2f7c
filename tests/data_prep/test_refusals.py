"""What cannot be written is refused in one line, and the old files stay."""

import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from data_prep.beton import writer
from tests.helpers.commands import ROOT
from tests.helpers.data_prep import (
    DEBIAN,
    assert_refused,
    needs_fashion_mnist,
    with_companions,
    write,
    write_folder,
)


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
    run_workers = writer.run_workers

    def run_short_of_room(*args) -> None:
        # Cuts the only page short, which the system reports as a partial write and FFCV overlooks.
        resource.setrlimit(resource.RLIMIT_FSIZE, (12 << 20, limits[1]))
        run_workers(*args)
        if room_again:  # before the parent's own writes could fail
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(writer, "run_workers", run_short_of_room)
    argv = ["--dataset", "imagefolder", "--root", photos, "--split", "test", "--out", tmp_path / "x.beton"]
    try:
        result = write(*argv, "--workers", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_refused(result, "error: --out: ", f"in {tmp_path}: free some space")
    assert os.listdir(tmp_path) == []
