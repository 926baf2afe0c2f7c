"""A store as one file to share: packed, unpacked elsewhere, and nothing left of a file that is damaged."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path

import pytest

from ckd_dist.core.errors import UserError
from ckd_dist.store.manifest import Manifest
from tests.helpers.here import run_here, store_here
from tests.helpers.stores import contents


@pytest.fixture
def packed(store, tmp_path) -> Path:
    """Two of the shared store's checkpoints, a view of each."""
    path = tmp_path / "teacher.tar"
    words = ["--checkpoints", 2, 3, "--views", 1, "--licence", "CC BY 4.0"]
    assert store_here("pack", store, path, *words) == 0
    return path


def test_a_packed_store_teaches_in_another_folder(packed, store, fashion, tmp_path, capsys):
    elsewhere = tmp_path / "elsewhere" / "store"
    assert store_here("unpack", packed, elsewhere) == 0
    assert "checkpoints 2, 3 on 1,201 images of fashion_mnist, all as packed" in capsys.readouterr().out
    manifest = Manifest.load(elsewhere, "")
    assert {name: each["views"] for name, each in manifest.checkpoints.items()} == {"epoch_0002": 1, "epoch_0003": 1}
    assert manifest.paths == {} and manifest.identity == Manifest.load(store, "").identity
    ours = contents(store)
    own = {name: digest for name, digest in contents(elsewhere).items() if name not in ("README.md", "manifest.json")}
    assert len(own) == 2 * 5 * 2 and all(ours[name] == digest for name, digest in own.items())
    assert store_here("verify", elsewhere, "--data.train", fashion["train"]) == 0
    assert f"{fashion['train']} is what it is of" in capsys.readouterr().out
    with pytest.raises(UserError, match="is of images with content_hash"):
        store_here("verify", elsewhere, "--data.train", fashion["holdout"])
    student = ["--data.train", fashion["train"], "--data.batch_size", 100, "--model.name", "resnet8", "--epochs", 1]
    run_here("distill", *student, "--teacher.store", elsewhere, "--run_dir", tmp_path / "student")


def test_its_bytes_are_those_of_its_records_and_any_tar_reads_it(packed, store, tmp_path):
    moved = shutil.copytree(store, tmp_path / "moved")
    again = tmp_path / "again.tar"
    words = ["--checkpoints", 3, 2, "--views", 1, "--licence", "CC BY 4.0"]
    assert store_here("pack", moved, again, *words) == 0
    assert again.read_bytes() == packed.read_bytes()
    with tarfile.open(packed) as tar:
        names = tar.getnames()
        card = tar.extractfile("README.md").read().decode()
    assert names[:2] == ["README.md", "manifest.json"] and len(names) == 2 + 2 * 5 * 2
    for told in (
        "**Licence**: CC BY 4.0",
        "fashion_mnist, 1,201 images of 10 classes (T-shirt/top, Trouser, ",
        "| epoch_0003 | resnet8",
    ):
        assert told in card
    assert str(store.parent) not in card + (tmp_path / "teacher.tar").read_bytes().decode("latin-1")


def rewritten(path: Path, change) -> None:
    """The members of an archive, a list of [TarInfo, bytes], as `change` leaves them."""
    with tarfile.open(path) as tar:
        members = [[info, tar.extractfile(info).read()] for info in tar]
    members = change(members) or members
    with tarfile.open(path, "w") as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def other_name(name: str):
    def change(members):
        members[4][0].name = name

    return change


def a_link(members):
    members[4][0].type, members[4][0].linkname = tarfile.SYMTYPE, "/etc/passwd"


def a_record(members):
    content = bytearray(members[2][1])
    content[-1] ^= 1
    members[2][1] = bytes(content)


def another_manifest(members):
    members[1][1] = members[1][1].replace(b'"count": 1201', b'"count": 1200')


DAMAGES = {
    "leads out of the folder": other_name("../../outside.npy"),
    "an absolute name": other_name("/tmp/outside.npy"),
    "a link": a_link,
    "a bit of a record": a_record,
    "the manifest": another_manifest,
    "one twice": lambda members: [*members, members[-1]],
    "one too few": lambda members: members[:-1],
    "another order": lambda members: [members[1], members[0], *members[2:]],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_leaves_nothing(packed, tmp_path, damage):
    rewritten(packed, damage)
    with pytest.raises(UserError, match=r"FILE: .*teacher\.tar.*(get it anew|put back|was changed)"):
        store_here("unpack", packed, tmp_path / "new" / "store")
    assert not list((tmp_path / "new").iterdir()) and not (tmp_path / "outside.npy").exists()


def test_what_is_no_packed_store_is_one_line(packed, store, tmp_path):
    cut = tmp_path / "cut.tar"
    cut.write_bytes(packed.read_bytes()[:-20000])
    (tmp_path / "text.tar").write_text("no tar")
    for path, expected in (
        (cut, r"cut\.tar (is no whole packed store|is damaged)"),
        (tmp_path / "text.tar", r"text\.tar is no whole packed store"),
        (tmp_path / "none.tar", r"no such file: .*none\.tar"),
    ):
        with pytest.raises(UserError, match=expected):
            store_here("unpack", path, tmp_path / "new")
    with pytest.raises(UserError, match="is there already: name a new folder"):
        store_here("unpack", packed, store)
    with pytest.raises(UserError, match="is there already: remove it"):
        store_here("pack", store, packed, "--licence", "MIT")
    for words, expected in ((["--checkpoints", 9], "no checkpoint of epoch 9"), (["--views", 3], "views is 3, and")):
        with pytest.raises(UserError, match=expected):
            store_here("pack", store, tmp_path / "x.tar", "--licence", "MIT", *words)
    assert not (tmp_path / "x.tar").exists()
