"""A store that keeps some of the teacher's classes, for students of fewer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ckd_dist.core.errors import UserError
from ckd_dist.data.beton import open_beton
from ckd_dist.data.dataset import read_info
from ckd_dist.data.loader import BetonLoader, decode_view, read_labels
from ckd_dist.data.options import LoaderConfig
from ckd_dist.data.recipe import ViewRecipe
from ckd_dist.nn import forward, models
from ckd_dist.store.reader import StoreReader
from tests.helpers.data_prep import write_folder
from tests.helpers.here import run_here, store_here
from tests.helpers.shared import make_once
from tests.helpers.views import CPU


@pytest.fixture(scope="module")
def images(tmp_path_factory, fashion) -> Path:
    """Ten coats, sandals and trousers each."""

    def make(folder: Path) -> None:
        info = read_info(fashion["train"], "")
        labels, whole = read_labels(info), ViewRecipe(kind="pad_crop", padding=0, flip=0.0)
        for name in ("Coat", "Sandal", "Trouser"):
            (folder / "images" / name).mkdir(parents=True)
            ids = np.flatnonzero(labels == info.classes.index(name))[:10]
            for number, pixels in enumerate(decode_view(info, whole, 0, 0, ids, 28)):
                Image.fromarray(pixels).save(folder / "images" / name / f"{number}.png")
        write_folder(folder / "images", folder / "images.beton", "--workers", 1)

    return make_once(tmp_path_factory, "three_classes", make) / "images.beton"


def test_a_store_keeps_some_of_the_teachers_classes(images, teacher, tmp_path):
    """Those that the images have: by name, by index, or from a file; a student of so many learns from them."""
    names = ["Coat", "Sandal", "Trouser"]
    every = ["--data.train", images, "--teacher.run", teacher, "--teacher.checkpoints", "[3]", "--amp", "off"]
    (tmp_path / "classes.txt").write_text("Coat\n5\nTrouser\n")
    for folder, given in (("names", json.dumps(names)), ("file", tmp_path / "classes.txt"), ("indices", "[4,5,1]")):
        run_here("cache_logits", *every, "--store", tmp_path / folder, "--teacher.classes", given)
    first, second, third = (StoreReader(str(tmp_path / each), [3]) for each in ("names", "file", "indices"))
    ids = np.arange(30)
    assert np.array_equal(first.rows(ids, 0), second.rows(ids, 0))
    assert np.array_equal(first.rows(ids, 0), third.rows(ids, 0))
    assert first.manifest.classes == names and first.manifest.dataset["num_classes"] == 3
    model, metadata = models.load_model(teacher / "checkpoints" / "epoch_0003.pt", "")
    loader = BetonLoader(
        open_beton(images, ""), LoaderConfig(), first.recipe, batch_size=30, image_size=28,
        device=CPU, mean=metadata["mean"], std=metadata["std"],
    )  # fmt: skip
    expected = forward.forward_logits(model.eval(), next(loader.batches(ids)).images, "off")[:, [4, 5, 1]]
    found = first.codec.decode(torch.from_numpy(first.rows(ids, 0)[:, 0]), 1.0)
    assert torch.allclose(found, expected, atol=0.01)
    student = ["--data.train", images, "--data.batch_size", 10, "--model.name", "resnet8", "--epochs", 1]
    run_here("distill", *student, "--teacher.store", tmp_path / "names", "--run_dir", tmp_path / "student")
    assert not store_here("verify", tmp_path / "names", "--teacher.run", teacher, "--data.train", images)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ('["Coat","Sandal","Hat"]', "teacher.classes: the teacher has no class Hat; it has 10, T-shirt/top, Trouser"),
        ("[4,5,10]", "teacher.classes: the teacher has no class 10"),
        ("[4,5,4]", "teacher.classes: give two classes or more, each once"),
        ("none.txt", "teacher.classes: no such file: none.txt"),
        ('["Coat","Trouser","Sandal"]', "data.train: class 1 of "),
        ('["Coat","Trouser"]', "data.train: "),
    ],
)
def test_classes_that_a_teacher_has_not_are_refused(images, teacher, tmp_path, given, expected):
    words = ["--data.train", images, "--teacher.run", teacher, "--store", tmp_path / "store"]
    with pytest.raises(UserError) as error:
        run_here("cache_logits", *words, "--teacher.classes", given)
    assert str(error.value).startswith(expected) and not (tmp_path / "store").exists()
