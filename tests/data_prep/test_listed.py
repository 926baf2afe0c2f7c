"""CSV tables, WebDataset shards and parquet files: the same images, byte for byte, as from class folders."""

import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from tests.helpers.data_prep import assert_refused, read, write

CLASSES = ["ant", "bee", "cat"]
SUFFIX = {"csv": ".csv", "webdataset": ".tar", "parquet": ".parquet"}


def write_csv(path: Path, images: list[Path], label: Callable[[Path], object]) -> None:
    rows = [f"{image},{label(image)}\n" for image in images]
    path.write_text("path,label\n" + "".join(rows))


def write_shard(path: Path, images: list[Path], label: Callable[[Path], object], form: str = "cls") -> None:
    """Samples as WebDataset's own writer lays them out: the label before the image."""
    with tarfile.open(path, "w") as tar:
        for image in images:
            key = f"{image.parent.name}_{image.stem}"
            text = str(label(image)) if form == "cls" else json.dumps({"label": label(image), "width": 3})
            for name, content in ((f"{key}.{form}", text.encode()), (f"{key}.jpg", image.read_bytes())):
                header = tarfile.TarInfo(name)
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))


def write_parquet(path: Path, images: list[Path], label: Callable[[Path], object], classes: bool = True) -> None:
    """As `datasets` writes it: types in the schema's metadata, small row groups."""
    labels = [label(image) for image in images]
    rows = [{"bytes": image.read_bytes(), "path": image.name} for image in images]
    features: dict = {"image": {"_type": "Image"}}
    if classes:
        labels = [CLASSES.index(str(each)) if each in CLASSES else each for each in labels]
        features["label"] = {"names": CLASSES, "_type": "ClassLabel"}
    table = pyarrow.table({"image": rows, "label": labels})
    told = json.dumps({"info": {"features": features}}).encode()
    parquet.write_table(table.replace_schema_metadata({b"huggingface": told}), path, row_group_size=17)


WRITE: dict[str, Callable[..., None]] = {"csv": write_csv, "webdataset": write_shard, "parquet": write_parquet}


def class_of(image: Path) -> str:
    return image.parent.name


def convert(kind: str, root: Path, *argv: object, split: str = "test"):
    out = root.parent / "x.beton"
    return write("--dataset", kind, "--root", root, "--split", split, "--out", out, *argv)


@pytest.mark.parametrize("kind", SUFFIX)
def test_a_file_gives_the_bytes_of_class_folders(tmp_path, photos, kind):
    images = sorted(photos.rglob("*.jpg"))
    path = tmp_path / f"photos{SUFFIX[kind]}"
    WRITE[kind](path, images, class_of)
    outs = [tmp_path / "folders.beton", tmp_path / "listed.beton"]
    for dataset, root, out in (("imagefolder", photos, outs[0]), (kind, path, outs[1])):
        argv = ("--split", "train", "--holdout", 0.2, "--write-mode", "jpg", "--workers", 1, "--out", out)
        assert write("--dataset", dataset, "--root", root, *argv).status == 0
    for ending in ("", ".digests.npy"):
        assert Path(f"{outs[0]}{ending}").read_bytes() == Path(f"{outs[1]}{ending}").read_bytes()
    folders, listed = (json.loads(Path(f"{out}.json").read_text()) for out in outs)
    for description in (folders, listed):
        del description["dataset"], description["source"]
    assert listed == folders and listed["classes"] == CLASSES


@pytest.mark.parametrize("kind", SUFFIX)
def test_parallel_workers_write_the_same(tmp_path, photos, kind):
    path = tmp_path / f"photos{SUFFIX[kind]}"
    WRITE[kind](path, sorted(photos.rglob("*.jpg")), class_of)
    hashes = []
    for workers in (1, 3):
        assert convert(kind, path, "--workers", workers, "--shuffle").status == 0
        hashes.append(json.loads((tmp_path / "x.beton.json").read_text())["content_hash"])
    assert hashes[0] == hashes[1]


NAMES = {
    "csv": {"train": ["train.csv"], "test": ["test.csv"]},
    "webdataset": {"train": ["in-train-000000.tar", "in-train-000001.tar"], "test": ["in-val-000000.tar"]},
    "parquet": {
        "train": ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
        "test": ["data/validation-00000-of-00001.parquet"],
    },
}


@pytest.mark.parametrize("kind", SUFFIX)
def test_a_folder_has_the_parts_that_names_say_and_classes_are_those_of_training(tmp_path, photos, kind):
    root = tmp_path / "in"
    (root / "data").mkdir(parents=True)
    images = sorted(photos.rglob("*.jpg"))
    parts = {"train": images[::2], "test": [image for image in images[1::2] if class_of(image) != "ant"]}
    for part, names in NAMES[kind].items():
        for number, name in enumerate(names):
            WRITE[kind](root / name, parts[part][number :: len(names)], class_of)
    (tmp_path / "out").mkdir()
    argv = ("--split", "all", "--holdout", 0, "--out", tmp_path / "out")
    assert write("--dataset", kind, "--root", root, *argv).status == 0
    for part, labels in {"train": {0, 1, 2}, "test": {1, 2}}.items():
        path = tmp_path / "out" / f"{part}.beton"
        assert len(read(path).labels) == len(parts[part]) and set(read(path).labels) == labels
        assert json.loads(Path(f"{path}.json").read_text())["classes"] == CLASSES


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("kind", SUFFIX)
def test_labels_may_be_numbers_whose_names_stand_in_a_file_beside(tmp_path, photos, kind, named):
    root = tmp_path / "in"
    root.mkdir()
    more = {"classes": False} if kind == "parquet" else {"form": "json"} if kind == "webdataset" else {}
    images = sorted(photos.rglob("*.jpg"))[::10]
    WRITE[kind](root / f"x{SUFFIX[kind]}", images, lambda image: CLASSES.index(class_of(image)), **more)
    if named:
        (root / "classes.txt").write_text("\n".join([*CLASSES, "dog"]) + "\n")
    assert convert(kind, root).status == 0
    assert read(tmp_path / "x.beton").labels == [CLASSES.index(class_of(image)) for image in images]
    classes = json.loads((tmp_path / "x.beton.json").read_text())["classes"]
    assert classes == ([*CLASSES, "dog"] if named else ["0", "1", "2"])


def test_parquet_test_images_without_labels_give_way_to_validation_images(tmp_path, photos):
    root = tmp_path / "in"
    root.mkdir()
    images = sorted(photos.rglob("*.jpg"))[::10]
    write_parquet(root / "test-00000-of-00001.parquet", images[:4], lambda image: -1)
    write_parquet(root / "validation-00000-of-00001.parquet", images[4:], class_of)
    result = convert("parquet", root)
    assert f"from {root}/validation-00000-of-00001.parquet" in result.err
    assert len(read(tmp_path / "x.beton").labels) == len(images) - 4


def test_without_pyarrow_the_message_says_what_to_install(tmp_path, photos, monkeypatch):
    write_parquet(tmp_path / "x.parquet", sorted(photos.rglob("*.jpg"))[:2], class_of)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert_refused(convert("parquet", tmp_path / "x.parquet"), "error: --dataset parquet needs pyarrow: pip install")


def test_a_table_needs_no_header_and_its_paths_count_from_its_folder(tmp_path, photos):
    rows = [f"bee;{photos.name}/bee/001.jpg", f"cat;{photos}/cat/002.jpg", f"cat;{photos.name}/list.txt"]
    root = photos.parent / "list.csv"
    root.write_text("label;file_name\n" + "\n".join(rows) + "\n")
    (photos.parent / "bare.csv").write_text("".join(f"{row.split(';')[1]},0\n" for row in rows[:2]))
    result = write("--dataset", "csv", "--root", root, "--split", "test", "--out", tmp_path / "x.beton")
    assert result.err == f"csv test: 2 of 2 images, classes: 2; from {root}; left out: 1 .txt\n"
    argv = ("--root", photos.parent / "bare.csv", "--split", "test", "--out", tmp_path / "y.beton")
    assert write("--dataset", "csv", *argv).status == 0
    assert read(tmp_path / "y.beton").labels == [0, 0]


def spoil(case: str, root: Path, images: list[Path]) -> tuple[str, str, str]:
    """Images that cannot be written; returns kind, the start of the message and a part of its rest."""
    kind = case.split()[0]
    path = root / f"x{SUFFIX[kind]}"
    gapped = {"ant": 0, "bee": 2, "cat": 3}
    if case == "csv of nothing":
        return kind, f"error: --root {root}: no .csv files there", "name the folder"
    if case == "csv with a gap":
        write_csv(path, images, lambda image: gapped[class_of(image)])
        return kind, f"error: {path}: labels are 3 different numbers, but none is 1", "classes.txt"
    if case == "csv without a label":
        path.write_text(f"{images[0]},ant\n{images[1]},\n")
        return kind, f"error: {path}: line 2 is no path and label", "correct or remove it"
    if case == "csv with a missing file":
        path.write_text(f"{images[0]},ant\ngone.jpg,bee\n")
        return kind, f"error: {path}: 1 of the 2 images listed are not there, first {root}/gone.jpg", "correct"
    if case == "csv with two labels":
        path.write_text(f"{images[0]},ant\n{images[0]},bee\n")
        return kind, f"error: {images[0]}: the same file as {images[0]}, of another class", "remove one"
    if case == "csv of ids":
        path.write_text("id,breed\n0a1b,ant\n")
        return kind, f"error: {path}: no images there (left out: 2 without suffix)", "name their files"
    if case == "webdataset without labels":
        write_shard(path, images, class_of, form="txt")
        return kind, f"error: {path}: 10 of 10 images without a label, first {path}: ant_000.jpg", "give them one"
    if case == "webdataset with another class":
        write_shard(path, images, class_of)
        (root / "classes.txt").write_text("ant\nbee\n")
        return kind, f"error: {path}: cat_000.jpg: its label 'cat' is none of the 2 classes", "correct it"
    if case == "webdataset of one part":
        write_shard(root / "train-0.tar", images, class_of)
        return kind, f"error: --root {root}: no .tar file of the test images there, only of train", "as test.tar"
    if case == "parquet without images":
        parquet.write_table(pyarrow.table({"text": ["a"], "label": [0]}), path)
        return kind, f"error: {path}: no column of images among text, label", "name it image"
    if case == "parquet of paths":
        parquet.write_table(pyarrow.table({"image": ["a.jpg"], "label": [0]}), path)
        return kind, f"error: {path}: its column image holds string, not encoded images", "save them as bytes"
    if case == "parquet with a row of nothing":
        parquet.write_table(pyarrow.table({"image": [images[0].read_bytes(), None], "label": [0, 0]}), path)
        return kind, f"error: {path}: row group 0, row 1: no image in this row", "leave it out"
    assert case == "parquet cut short"
    write_parquet(path, images, class_of)
    path.write_bytes(path.read_bytes()[:-100])
    return kind, f"error: {path}: not a parquet file", "get it anew"


@pytest.mark.parametrize(
    "case",
    [
        "csv of nothing",
        "csv with a gap",
        "csv without a label",
        "csv with a missing file",
        "csv with two labels",
        "csv of ids",
        "webdataset without labels",
        "webdataset with another class",
        "webdataset of one part",
        "parquet without images",
        "parquet of paths",
        "parquet with a row of nothing",
        "parquet cut short",
    ],
)
def test_what_cannot_be_written_is_one_line_with_the_mend(tmp_path, photos, case):
    root = tmp_path / "in"
    root.mkdir()
    kind, start, mend = spoil(case, root, sorted(photos.rglob("*.jpg"))[::20])
    assert_refused(convert(kind, root), start, mend)
    assert not list(tmp_path.glob("*x.beton*"))
