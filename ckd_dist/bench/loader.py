"""Decoding: our views, FFCV's stock decoder, and torchvision with PyTorch's DataLoader, from the same stored images;
ours and torchvision's with RandAugment too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
from ffcv.transforms import RandomHorizontalFlip
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from ckd_dist.bench.measure import Row, in_turn
from ckd_dist.core import dist
from ckd_dist.data import dataset
from ckd_dist.data.dataset import DatasetInfo
from ckd_dist.data.ffcv_repairs import IMAGE_MODES, Epoch, IntDecoder, Loader, OrderOption, ToTensor
from ckd_dist.data.loader import BetonLoader, read_labels, stored_images
from ckd_dist.data.options import LoaderConfig
from ckd_dist.data.recipe import ViewRecipe
from ckd_dist.studies.commands import run_module

SIZE, BATCH_SIZE, PHOTOGRAPHS, PASSES = 224, 64, 512, 4
MODES = {"jpg": "JPEG", "proportion": "half JPEG, half raw", "raw": "raw"}


def photograph_files(folder: Path) -> Path:
    """A folder of images of 500 x 375 px with detail at every scale, JPEG files of about 100 kB as ImageNet's."""
    from PIL import Image

    root = folder / "photographs"
    if root.exists():
        return root
    rng = np.random.default_rng(0)
    (root / "all").mkdir(parents=True)
    for number in range(PHOTOGRAPHS):
        image = np.zeros((375, 500, 3))
        for octave in range(2, 9):
            small = rng.normal(size=(3 * 2**octave // 4 + 1, 2**octave, 3)) / octave
            channels = [Image.fromarray(small[..., c].astype(np.float32)).resize((500, 375), 2) for c in range(3)]
            image += np.stack([np.asarray(channel) for channel in channels], axis=2)
        pixels = (128 + 50 * image / image.std()).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / "all" / f"{number:04d}.jpg", quality=92)
    return root


def photographs(folder: Path, mode: str) -> DatasetInfo:
    """The .beton file of a storage mode: raw ones of 256 px, as raw ones of ImageNet would be."""
    path = folder / f"photographs_{mode}.beton"
    if not path.exists():
        root = photograph_files(folder)
        options = ["--dataset", "imagefolder", "--root", root, "--split", "test", "--write-mode", mode, "--out", path]
        if mode != "jpg":
            options += ["--max-resolution", 341]
        run_module(f"photographs, {MODES[mode]}", "data_prep.write_beton", *options)
    return dataset.read_info(path, "RUN_DIR")


class StoredImages(Dataset):
    """The images as they lie in the .beton file, decoded and transformed by torchvision."""

    def __init__(self, info: DatasetInfo, *more: Any):
        self._count, self._read, self._labels = info.count, stored_images(info), read_labels(info)
        self._transform = v2.Compose([v2.RandomResizedCrop(SIZE, antialias=True), v2.RandomHorizontalFlip(), *more])

    def __len__(self) -> int:
        return self._count * PASSES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        stored, field = self._read(index % self._count)
        if field["mode"] == IMAGE_MODES["jpg"]:
            image = decode_jpeg(torch.from_numpy(stored), mode=ImageReadMode.RGB)
        else:
            image = torch.from_numpy(stored).view(int(field["height"]), int(field["width"]), 3).permute(2, 0, 1)
        return self._transform(image), int(self._labels[index % self._count])


def measure(folder: Path) -> list[Row]:
    """Images/s a core to uint8 batches in memory: random crops of 224 px, mirrored at random, in random order."""
    return [row for mode in MODES for row in _measure_mode(photographs(folder, mode), mode)]


def _measure_mode(info: DatasetInfo, mode: str) -> list[Row]:
    cores = dist.cores_per_rank()
    recipe = ViewRecipe(kind="random_resized_crop")
    config, cpu = LoaderConfig(workers=cores), torch.device("cpu")
    ours, changed = (
        BetonLoader(info, config, each, batch_size=BATCH_SIZE, image_size=SIZE, device=cpu)
        for each in (recipe, replace(recipe, policy="rand_augment"))
    )
    label: list[Any] = [IntDecoder(), ToTensor()]
    image = [RandomResizedCropRGBImageDecoder((SIZE, SIZE)), RandomHorizontalFlip(), ToTensor()]
    stock = Loader(
        str(info.path),
        batch_size=BATCH_SIZE,
        num_workers=cores,
        order=OrderOption.SEQUENTIAL,
        pipelines={"image": image, "label": label},
    )
    workers, changing = (
        DataLoader(each, BATCH_SIZE, shuffle=True, num_workers=cores, persistent_workers=True, prefetch_factor=4)
        for each in (StoredImages(info), StoredImages(info, v2.RandAugment(recipe.operations, recipe.magnitude)))
    )
    rng = np.random.default_rng(0)

    def order() -> np.ndarray:
        return np.concatenate([rng.permutation(info.count) for _ in range(PASSES)]).astype(np.uint64)

    def consume(batches) -> float:
        return sum(len(batch[0]) for batch in batches) / cores

    works = {
        "FFCV, stock decoder": lambda: consume(Epoch(stock, order(), lambda ids: None)),
        "ckd_dist": lambda: consume(Epoch(ours.pipeline, order(), lambda ids: None)),
        "torchvision v2 + DataLoader": lambda: consume(workers),
        "ckd_dist, RandAugment": lambda: consume(Epoch(changed.pipeline, order(), lambda ids: None)),
        "torchvision v2, RandAugment": lambda: consume(changing),
    }
    case = f"loader, {MODES[mode]}, {SIZE} px"
    limits = {"ckd_dist": "arithmetic: decoding, resizing" if mode != "raw" else "arithmetic: resizing"}
    references = {"ckd_dist, RandAugment": "ckd_dist", "torchvision v2, RandAugment": "ckd_dist, RandAugment"}
    rows = in_turn(case, "images/s a core", works, rounds=5, references=references, limits=limits)
    torch.set_num_threads(cores)
    return rows
