"""Images without labels: any tree of folders."""

import json

from tests.helpers.data_prep import assert_refused, photo, read, save, write


def test_every_image_of_a_tree_is_written_and_the_description_names_no_classes(tmp_path):
    root = tmp_path / "in"
    for i, name in enumerate(["b.png", "a.png", "deep/er/c.png", "@eaDir/d.png", ".hidden.png"]):
        save(root / name, photo(8, 8, seed=i))
    (root / "list.txt").write_text("no image")
    save(root / "same.png", photo(8, 8, seed=0))
    out = tmp_path / "x.beton"
    result = write("--dataset", "images", "--root", root, "--split", "train", "--holdout", 0, "--out", out)
    assert result.err.splitlines() == [
        "images train: 4 of 4 images, classes: none; left out: 1 system folders, 1 hidden, 1 .txt",
        "warning: 2 images of x.beton are the same as another of it, pixel for pixel",
    ]
    stored = read(out)
    assert stored.labels == [0] * 4
    assert [image.tobytes() for image in stored.images] == [photo(8, 8, seed=i).tobytes() for i in (1, 0, 0, 2)]
    description = json.loads((tmp_path / "x.beton.json").read_text())
    assert (description["labels"], description["classes"], description["num_classes"]) == (False, [], 1)


def test_all_parts_are_training_and_held_out_images(tmp_path):
    for i in range(10):
        save(tmp_path / "in" / f"{i}.png", photo(8, 8, seed=i))
    (tmp_path / "out").mkdir()
    argv = ("--dataset", "images", "--root", tmp_path / "in", "--split", "all", "--holdout", 0.3)
    assert write(*argv, "--out", tmp_path / "out").status == 0
    counts = {path.stem: len(read(path).labels) for path in (tmp_path / "out").glob("*.beton")}
    assert counts == {"train": 7, "holdout": 3}


def test_a_folder_without_images_is_refused(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    (root / "list.txt").write_text("no image")
    result = write("--dataset", "images", "--root", root, "--split", "test", "--out", tmp_path / "x.beton")
    assert_refused(result, f"error: --root {root}: no images there (left out: 1 .txt)", "add some")
