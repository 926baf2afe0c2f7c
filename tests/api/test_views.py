"""Views without FFCV are FFCV's, byte for byte, and come in the order of distill."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import ckd_dist
from ckd_dist.core.errors import UserError
from ckd_dist.data import dataset
from ckd_dist.data.loader import decode_view, image_digests
from ckd_dist.data.order import shuffled_ids, train_ids
from ckd_dist.data.recipe import ViewRecipe
from ckd_dist.data.views.mixing import mixes
from tests.helpers.commands import run
from tests.helpers.photographs import write_photographs
from tests.helpers.shared import make_once
from tests.helpers.views import EVERYTHING, PAD, RRC

RECIPES = {
    "pad_crop": PAD,
    "random_resized_crop": RRC,
    "center_crop": ViewRecipe(kind="center_crop", center_share=0.875, flip=0.0),
    "colour": replace(RRC, color_jitter=0.4),
    "erasing": replace(RRC, erase=1.0),
    "mixup": replace(RRC, mixup=0.4),
    "cutmix": replace(PAD, cutmix=1.0),
    "trivial_augment": replace(RRC, policy="trivial_augment"),
    "auto_augment": replace(RRC, policy="auto_augment"),
    "three_augment": replace(PAD, policy="three_augment"),
    "everything": replace(RRC, **EVERYTHING),
}


@pytest.fixture(scope="session")
def modes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """24 photographs, stored raw, as JPEG, and half of them so and scaled down; beside the files, their folder."""

    def make(folder: Path) -> None:
        write_photographs(folder / "images", {"ash": 12, "beech": 12})
        for mode, more in (("raw", ()), ("jpg", ()), ("proportion", ("--max-resolution", 70))):
            options = ("--root", folder / "images", "--split", "test", "--write-mode", mode, *more)
            run("data_prep.write_beton", "--dataset", "imagefolder", *options, "--out", folder / f"{mode}.beton")

    folder = make_once(tmp_path_factory, "modes", make)
    return {**{mode: folder / f"{mode}.beton" for mode in ("raw", "jpg", "proportion")}, "folder": folder / "images"}


def as_ffcv(path, recipe, seed, view, ids, size):
    """The same views as FFCV's decoder gives them, uint8 [n, 3, size, size]."""
    images = decode_view(dataset.read_info(path, ""), recipe, seed, view, np.asarray(ids), size)
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def shown(views, view, ids):
    return torch.stack([views[view, sample]["image"] for sample in ids])


@pytest.mark.parametrize("mode", ["raw", "jpg", "proportion"])
@pytest.mark.parametrize("name", RECIPES)
def test_views_are_ffcvs_byte_for_byte(modes, name, mode):
    recipe, images = RECIPES[name], ckd_dist.BetonImages(modes[mode])
    for size, view in ((24, 0), (64, 3), (150, 1 << 20)):
        views = ckd_dist.Views(images, recipe, seed=5, size=size)
        expected = as_ffcv(modes[mode], recipe, 5, view, range(len(views)), size)
        torch.testing.assert_close(shown(views, view, range(len(views))), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["pad_crop", "cutmix", "three_augment"])
@pytest.mark.parametrize("size", [28, 20, 40])
def test_small_images_too(fashion, name, size):
    images = ckd_dist.BetonImages(fashion["holdout"])
    assert (len(images), images[7][0].shape) == (301, (28, 28, 3))
    views = ckd_dist.Views(images, RECIPES[name], seed=1, size=size)
    expected = as_ffcv(fashion["holdout"], RECIPES[name], 1, 2, range(60), size)
    torch.testing.assert_close(shown(views, 2, range(60)), expected, rtol=0, atol=0)


@pytest.mark.parametrize(("start", "workers"), [(None, 0), ("fork", 1), ("fork", 2), ("spawn", 2)])
def test_workers_give_the_same_views_and_follow_the_epochs(modes, start, workers):
    recipe = RECIPES["everything"]
    views = ckd_dist.Views(ckd_dist.BetonImages(modes["jpg"]), recipe, seed=0, size=32)
    sampler = ckd_dist.ViewSampler(len(views), views=2, batch_size=10, seed=3)
    loader = DataLoader(
        views, batch_size=10, sampler=sampler, num_workers=workers, multiprocessing_context=start,
        persistent_workers=workers > 0,
    )  # fmt: skip
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = list(loader)
        ids = torch.cat([batch["id"] for batch in batches])
        assert len(loader) == 2 and ids.tolist() == train_ids(shuffled_ids(24, 3, epoch), 10).tolist()
        for batch in batches:
            assert batch["view"].tolist() == [epoch % 2] * 10
            expected = as_ffcv(modes["jpg"], recipe, 0, epoch % 2, batch["id"].numpy(), 32)
            torch.testing.assert_close(batch["image"], expected, rtol=0, atol=0)
            others, weights, _ = mixes(recipe, 0, epoch % 2, batch["id"].numpy(), 24)
            labels = views.images.labels
            assert batch["label"].tolist() == labels[batch["id"]].tolist()
            assert batch["other_label"].tolist() == labels[others].tolist()
            torch.testing.assert_close(batch["weight"], torch.from_numpy(weights), rtol=0, atol=0)


def test_images_of_any_kind_are_seen_as_they_are(modes):
    beton, folder = ckd_dist.BetonImages(modes["raw"]), ImageFolder(modes["folder"])
    files = [(Path(path), label) for path, label in folder.samples]
    expected = ckd_dist.Views(beton, RRC, seed=0, size=32)
    arrays = [(np.asarray(image), label) for image, label in folder]
    tensors = [(torch.from_numpy(image.copy()).permute(2, 0, 1), label) for image, label in arrays]
    for images in (folder, arrays, tensors):
        found = ckd_dist.Views(images, RRC, seed=0, size=32)
        for i in range(24):
            torch.testing.assert_close(found[1, i]["image"], expected[1, i]["image"], rtol=0, atol=0)
            assert found[1, i]["label"] == expected[1, i]["label"]
    # The folder's own JPEG files, decoded as FFCV would decode them, are near the pixels that PIL had.
    fast = ckd_dist.Views(files, RRC, seed=0, size=32)
    difference = (shown(fast, 1, range(24)).int() - shown(expected, 1, range(24)).int()).abs()
    assert difference.max() > 0 and difference.float().mean() < 1
    grey = Image.fromarray(np.arange(784, dtype=np.uint8).reshape(28, 28))
    png = io.BytesIO()
    grey.save(png, "png")
    two = [ckd_dist.Views([(image, 0)], PAD, seed=0, size=28)[0, 0]["image"] for image in (grey, png.getvalue())]
    torch.testing.assert_close(*two, rtol=0, atol=0)
    assert (two[0][0] == two[0][1]).all()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((28, 28, 3), dtype=np.float32), r"image 0 is float32 \[28, 28, 3\]: give a PIL image"),
        (torch.zeros(3, 28, 28), "image 0 is float32"),
        (b"\xff\xd8\xff nothing", "image 0 cannot be decoded"),
        (b"nothing", "image 0 cannot be decoded"),
        ("text", "image 0 .text. cannot be read"),
    ],
)
def test_what_is_no_image_is_refused(image, message):
    with pytest.raises(UserError, match=message):
        ckd_dist.Views([(image, 0)], PAD, seed=0, size=28)[0, 0]


def test_a_fingerprint_is_that_of_a_store(modes):
    for recipe in (RRC, RECIPES["mixup"]):
        views = ckd_dist.Views(ckd_dist.BetonImages(modes["proportion"]), recipe, seed=4, size=99)
        info = dataset.read_info(modes["proportion"], "")
        assert views.fingerprint(48) == image_digests(info, recipe, 4, 48) != views.fingerprint()


def test_a_store_refuses_other_views(fashion, store):
    opened = ckd_dist.open_store(store)
    images = ckd_dist.BetonImages(fashion["train"])

    def views(images=images, recipe=opened.recipe, seed=0, **more):
        return ckd_dist.Views(images, recipe, seed=seed, size=20, **more)

    opened.require_views(views())
    shifted = [images[(i + 1) % len(images)] for i in range(len(images))]
    opened.require_views(views(shifted), other_pixels=True)
    another = ckd_dist.BetonImages(fashion["train"])
    another.info = replace(another.info, content_hash="sha256:0")
    blur = {"transform": v2.GaussianBlur(3), "transform_name": "blur 3"}
    opened.require_views(views(**blur), student_only="blur 3")
    for other, options, message in (
        (views(another), {}, "train.beton is not the file of the store"),
        (views(shifted), {}, "image 0, 400, 800, 1200 is another one"),
        (views(seed=1), {}, "the store has seed 0, these have 1"),
        (views(recipe=RRC), {}, "the store has recipe"),
        (views(ckd_dist.BetonImages(fashion["holdout"])), {}, "the store has 1201 images, these are 301"),
        (views(**blur), {}, "saw views with transform None, these are with blur 3"),
        (views(**blur), {"student_only": "sharpen"}, "with blur 3"),
        (views(), {"student_only": "sharpen"}, "student_only: the views' transform is None"),
    ):
        with pytest.raises(UserError, match=message):
            opened.require_views(other, **options)
    with pytest.raises(UserError, match="transform_name: give transform and its name together"):
        views(transform=v2.GaussianBlur(3))


def test_a_transform_is_a_function_of_seed_view_and_image(fashion):
    images = ckd_dist.BetonImages(fashion["holdout"])
    augment = {"transform": v2.RandAugment(2, 9), "transform_name": "randaugment 2 9"}
    views = ckd_dist.Views(images, PAD, seed=0, size=28, **augment)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = shown(views, 0, range(50))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert torch.equal(shown(views, 0, reversed(range(50))).flip(0), first)
    assert not torch.equal(shown(views, 1, range(50)), first)
    assert not torch.equal(first, shown(ckd_dist.Views(images, PAD, seed=0, size=28), 0, range(50)))


def test_a_training_goes_on_where_its_sampler_was():
    def sampler():
        return ckd_dist.ViewSampler(103, views=2, batch_size=10, seed=1)

    whole, again = sampler(), sampler()
    whole.set_epoch(3)
    expected = list(whole)
    assert len(expected) == len(whole) == 100 and {view for view, _ in expected} == {1}
    again.load_state_dict(whole.state_dict(4))
    again.set_epoch(3)
    assert len(again) == 60 and list(again) == expected[40:]
    again.set_epoch(4)
    assert len(again) == 100 and again.state_dict()["step"] == 0
    other = ckd_dist.ViewSampler(103, views=2, batch_size=10, seed=2)
    with pytest.raises(UserError, match="seed: the training had 1, this sampler has 2"):
        other.load_state_dict(whole.state_dict(4))
    with pytest.raises(UserError, match="batch_size 104 is larger than the 103 images"):
        ckd_dist.ViewSampler(103, views=2, batch_size=104)


RANKS = """
import sys, ckd_dist
from ckd_dist.core import dist
with dist.process_group():
    sampler = ckd_dist.ViewSampler(103, views=1, batch_size=10, seed=1)
    mine = list(sampler)
    assert len(mine) == len(sampler)
    with open(f"{sys.argv[1]}/{dist.rank()}", "w") as file:
        file.write(" ".join(str(sample) for _, sample in mine))
"""


def test_ranks_share_every_batch(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    run(str(tmp_path / "ranks.py"), tmp_path, nproc=2)
    first, second = (np.array((tmp_path / str(rank)).read_text().split(), dtype=int) for rank in (0, 1))
    batches = np.concatenate([first.reshape(10, 5), second.reshape(10, 5)], axis=1)
    assert batches.reshape(-1).tolist() == train_ids(shuffled_ids(103, 1, 0), 10).tolist()


def test_damaged_files_are_refused(modes, tmp_path):
    path = tmp_path / "jpg.beton"
    path.with_suffix(".beton.json").write_bytes(modes["jpg"].with_suffix(".beton.json").read_bytes())
    content = bytearray(modes["jpg"].read_bytes())
    for offset in (0, 24, len(content) - 12):
        damaged = content.copy()
        damaged[offset] ^= 0xFF
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"images: .*jpg\.beton is (not laid out|damaged)"):
            ckd_dist.BetonImages(path)
    with pytest.raises(IndexError, match="image 24 of 24"):
        ckd_dist.BetonImages(modes["jpg"])[24]


def test_views_need_no_ffcv(modes, tmp_path):
    program = tmp_path / "views.py"
    program.write_text(
        "import sys\n"
        "sys.modules['ffcv'] = None\n"
        "import ckd_dist\n"
        "recipe = ckd_dist.ViewRecipe(kind='random_resized_crop', mixup=1.0)\n"
        "views = ckd_dist.Views(ckd_dist.BetonImages(sys.argv[1]), recipe, seed=0, size=32)\n"
        "print(views[0, 5]['image'].shape)\n"
        "sys.modules['cv2'] = None\n"
        "from ckd_dist.data.views import replay\n"
        "replay._opencv.cache_clear()\n"
        "try:\n"
        "    views[0, 5]\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    done = run(str(program), modes["jpg"]).stdout.splitlines()
    assert done[0] == "torch.Size([3, 32, 32])" and "pip install 'ckd_dist[views]'" in done[1]
