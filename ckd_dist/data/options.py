"""Options that say where images come from and how they are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ckd_dist.core.errors import require
from ckd_dist.core.options import COUNT, SEED, SHARE, SIDE, require_ranges
from ckd_dist.data.recipe import MAX_MAGNITUDE, MAX_OPERATIONS, Policy

MapClasses = Literal["by_name", "by_position"]


@dataclass(kw_only=True)
class LoaderConfig:
    """How images are read."""

    batch_size: int = 128
    """Images an optimiser step, over all ranks; for cache_logits and evaluate: images a forward pass."""
    image_size: int | None = None
    """Side of the square image a model sees, in pixels; default: for a teacher the side that it was trained at, in an
    evaluation the one that it was evaluated at, else the stored size of small images, else 224."""
    workers: int | None = None
    """Decoding threads of each rank; default: its share of the cores on a GPU node, 1 on a CPU."""
    os_cache: bool = True
    """Read through the system's page cache; false: each rank reads pages into memory of its own."""
    verify: bool = True
    """Compare a .beton file with its hash when it is first used, which reads all of it once: X.beton.verified beside
    it, or a file in ~/.cache/ckd_dist, remembers its size and time."""
    map_classes: MapClasses | None = None
    """Where classes have other names, or another order, than those of the model, the store or the training images:
    by_name maps labels to the class of the same name, 007 and 7 being the same; by_position takes them as they are,
    since only the names differ. Default: that is refused."""

    def __post_init__(self) -> None:
        require_ranges(self, "data.", batch_size=COUNT, image_size=SIDE, workers=(1, 1024))


@dataclass(kw_only=True)
class ViewDataConfig(LoaderConfig):
    """Where the images come from and how their views are drawn."""

    train: str
    """Training images: a .beton file of data_prep.write_beton."""
    augment: Literal["random_resized_crop", "pad_crop", "center_crop"] | None = None
    """Kind of view; default: the store's, else pad_crop for images of one size up to 64 px, else random_resized_crop;
    center_crop: the square that is evaluated, nothing drawn."""
    crop_scale_min: float | None = None
    """Smallest share of the area that random_resized_crop keeps; default: the store's, else 0.08."""
    flip: bool | None = None
    """Mirror half of the views; default: the store's, else true."""
    policy: Policy | None = None
    """Change views as a published policy draws it, by torchvision's operations. trivial_augment: one of 14, at any
    strength; rand_augment: some of them (operations) at one strength (magnitude); auto_augment: one of ImageNet's 25
    pairs; three_augment: grey, solarised or blurred, as DeiT III; default: the store's, else none."""
    operations: int | None = None
    """rand_augment: how many operations change a view; default: the store's, else 2."""
    magnitude: int | None = None
    """rand_augment: how strong they are, 0 to 30; default: the store's, else 9."""
    color_jitter: float | None = None
    """Change brightness, contrast and saturation, each by up to this share; default: the store's, else 0."""
    grayscale: float | None = None
    """Probability that a view loses its colours; default: the store's, else 0."""
    blur: float | None = None
    """Probability that a view is blurred, with a deviation of 0.1 to 2 pixels of 224; default: the store's, else 0."""
    solarize: float | None = None
    """Probability that what is bright in a view, 128 and more of 255, is inverted; default: the store's, else 0."""
    erase: float | None = None
    """Probability that a box of a view is erased; default: the store's, else 0."""
    mixup: float | None = None
    """Blend every image with another by a weight from Beta(mixup, mixup); default: the store's, else 0: never."""
    cutmix: float | None = None
    """Show another image in a box of every image, its area from Beta(cutmix, cutmix); with mixup too, either takes half
    of the images. Mixing decodes two images for one; default: the store's, else 0: never."""
    mix: float | None = None
    """Probability that an image is mixed at all, with mixup or cutmix; default: the store's, else 1: every image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_ranges(
            self, "data.", crop_scale_min=(1e-6, 1), operations=(1, MAX_OPERATIONS), magnitude=(0, MAX_MAGNITUDE)
        )
        require_ranges(self, "data.", color_jitter=(0, 10), grayscale=SHARE, blur=SHARE, solarize=SHARE, erase=SHARE)
        require_ranges(self, "data.", mixup=(0, 10), cutmix=(0, 10), mix=(1e-6, 1))


@dataclass(kw_only=True)
class TrainDataConfig(ViewDataConfig):
    """Where the images come from and how their views are drawn."""

    val: str | None = None
    """Images to evaluate on: a .beton file."""
    views: int | None = None
    """Number of distinct views: epoch e uses view e mod views; default: as many as the store holds, else a
    new view every epoch."""
    view_seed: int | None = None
    """Seed of the views, apart from --seed; default: the store's, else 0."""
    repeats: int = 1
    """Show each image of a step under so many views at once, and fewer images; as many epochs have the same views as
    without (batch augmentation)."""
    pair_mixup: float = 0.0
    """Blend the images of a step in pairs, by weights from Beta(pair_mixup, pair_mixup): drawn anew in every epoch, and
    nothing more is decoded. Of a store's answers each has its weight in the loss, a rough approximation of the
    teacher's answer to the mixed image; an online teacher is asked about that, and a store of mixup."""
    pair_cutmix: float = 0.0
    """The same by a box of each image that shows the other; with pair_mixup too, either takes half of the pairs."""
    order: Literal["random", "quasi_random"] = "random"
    """random: any image may come at any time. quasi_random, for files larger than memory: the file is read once an
    epoch, its pages (mostly 8 MB) in random order, and images are shuffled within a window of them."""
    window_pages: int = 128
    """quasi_random: pages in a window; twice as many should fit into memory."""
    start_image_size: int | None = None
    """Train on images of this side at first, for speed: from 73 % to 85 % of the epochs it rises to image_size."""
    val_image_size: int | None = None
    """Evaluate on images of this side; default: image_size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_ranges(
            self,
            "data.",
            views=COUNT,
            view_seed=SEED,
            repeats=COUNT,
            pair_mixup=(0, 10),
            pair_cutmix=(0, 10),
            window_pages=COUNT,
            start_image_size=SIDE,
            val_image_size=SIDE,
        )
        require(
            self.batch_size % self.repeats == 0,
            f"data.repeats {self.repeats} does not divide data.batch_size {self.batch_size}: choose one that does",
        )


@dataclass(kw_only=True)
class EvalDataConfig(LoaderConfig):
    """Where the images come from."""

    val: str
    """Images to evaluate on: a .beton file of data_prep.write_beton."""
