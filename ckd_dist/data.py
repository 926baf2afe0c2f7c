"""From a .beton file to batches on the device: decoded, normalised, labelled, with sample ids and cached rows."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch

from ckd_dist import dist
from ckd_dist.config import LoaderConfig, TrainDataConfig, UserError, ViewDataConfig, require
from ckd_dist.ffcv_mended import Epoch, IntDecoder, Loader, OrderOption, PipelineSpec, Reader, ToTensor
from ckd_dist.losses import Mixed, over_labels
from ckd_dist.views import SampleIdDecoder, ViewDecoder, ViewRecipe, partners, render

Rows = Callable[[np.ndarray, int], np.ndarray]
"""(sample ids [n], view) -> a store's records, uint8 [n, members, bytes]; called in the loader's thread."""


# ------------------------------------------------------------------------------------------- description


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """What the JSON beside a .beton file says of it."""

    path: Path
    dataset: str
    split: str
    count: int
    num_classes: int
    content_hash: str
    """sha256 of labels, sizes and stored image bytes in sample order."""
    mean: tuple[float, float, float]
    """Of pixels in [0, 1], for normalisation."""
    std: tuple[float, float, float]
    min_size: tuple[int, int]
    """Smallest (height, width) stored, in pixels."""
    max_size: tuple[int, int]

    @property
    def small(self) -> bool:
        """Whether the images are of one size, up to 64 px, as CIFAR's are."""
        return self.min_size == self.max_size and max(self.max_size) <= 64

    def image_size(self, wanted: int | None) -> int:
        """Side of the images that models see: `wanted`, else the stored size of small images, else 224."""
        return wanted or (max(self.max_size) if self.small else 224)


def read_info(path: str | Path, option: str) -> DatasetInfo:
    """Read the description beside the .beton file `path`, which the user gave as `option`.

    Raises `UserError` where either file is missing or they do not belong together.
    """
    path = Path(path)
    description = Path(f"{path}.json")
    require(path.is_file(), f"{option}: no such file: {path} (write it with python -m data_prep.write_beton)")
    require(description.is_file(), f"{option}: {description} is missing: write {path} anew with data_prep.write_beton")
    try:
        values = json.loads(description.read_text())
        require(values["format"] == 1, f"{option}: {description} has format {values['format']}, this version reads 1")
        info = DatasetInfo(
            path=path,
            dataset=values["dataset"],
            split=values["split"],
            count=values["count"],
            num_classes=values["num_classes"],
            content_hash=values["content_hash"],
            mean=tuple(values["normalization"]["mean"]),
            std=tuple(values["normalization"]["std"]),
            min_size=tuple(values["image_size"]["min"]),
            max_size=tuple(values["image_size"]["max"]),
        )
        stored, described = path.stat().st_size, values["beton_bytes"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{option}: {description} is damaged ({error!r}): write {path} anew") from None
    require(stored == described, f"{option}: {path} has {stored} bytes, {description} says {described}: write it anew")
    return info


def read_labels(info: DatasetInfo) -> np.ndarray:
    """Class index of every sample, int64 [count], without decoding an image."""
    reader = Reader(str(info.path))
    return _metadata(reader, "label").astype(np.int64).reshape(-1)


def _metadata(reader: Reader, field: str) -> np.ndarray:
    """What FFCV's reader knows of a field of every sample."""
    return reader.metadata[f"f{reader.field_names.index(field)}"]


def stored_images(info: DatasetInfo) -> Callable[[int], tuple[np.ndarray, np.void]]:
    """A function that reads an image, by its id, as FFCV keeps it: its bytes, uint8, and its metadata."""
    reader = Reader(str(info.path))
    fields = _metadata(reader, "image")
    table = np.sort(reader.alloc_table, order="ptr")

    def read(sample: int) -> tuple[np.ndarray, np.void]:
        field = fields[sample]
        size = table["size"][np.searchsorted(table["ptr"], field["data_ptr"])]
        return np.fromfile(info.path, np.uint8, int(size), offset=int(field["data_ptr"])), field

    return read


def decode_view(
    info: DatasetInfo, recipe: ViewRecipe, seed: int, view: int, ids: np.ndarray, image_size: int
) -> np.ndarray:
    """A few samples as models see them under `view`, before normalisation, uint8 [n, size, size, 3]: what a loader
    gives, without the second that setting one up takes."""
    read = stored_images(info)
    return np.stack([render(read, info.count, recipe, seed, view, int(sample), image_size) for sample in ids])


def image_digests(info: DatasetInfo, recipe: ViewRecipe, seed: int, image_size: int) -> dict[str, str]:
    """Sample id -> sha256 of its first view, uint8 [size, size, 3], for a few samples: tells one JPEG or resize library
    from another."""
    ids = np.unique(np.linspace(0, info.count - 1, 4).astype(np.int64))
    images = decode_view(info, recipe, seed, 0, ids, image_size)
    return {str(i): hashlib.sha256(image.tobytes()).hexdigest() for i, image in zip(ids, images, strict=True)}


def train_recipe(config: ViewDataConfig, info: DatasetInfo, cached: ViewRecipe | None = None) -> ViewRecipe:
    """The views to train on: what the options say, else the `cached` recipe, else what fits the images.

    Raises `UserError` where an option contradicts `cached` or the images.
    """
    kind = config.augment or (cached.kind if cached else "pad_crop" if info.small else "random_resized_crop")
    require(
        kind != "pad_crop" or info.min_size == info.max_size,
        "data.augment pad_crop needs images of one size: use random_resized_crop",
    )
    default = cached or ViewRecipe(kind=kind)
    asked = {
        "kind": kind,
        "scale": config.crop_scale_min and (config.crop_scale_min, 1.0),
        "flip": None if config.flip is None else 0.5 * config.flip,
        **{name: getattr(config, name) for name in ("color_jitter", "erase", "mixup", "cutmix")},
    }
    recipe = replace(default, **{name: value for name, value in asked.items() if value is not None})
    if cached is not None:
        wanted, held = recipe.to_dict(), cached.to_dict()
        for name, ours in wanted.items():
            option = {"kind": "augment", "scale": "crop_scale_min"}.get(name, name)
            require(
                ours == held[name],
                f"data.{option}: the store holds views with {name} {held[name]}, not {ours}: leave it out",
            )
    return recipe


def eval_recipe(info: DatasetInfo) -> ViewRecipe:
    """The whole of a small image; the central 224/256 of a photograph's shorter side."""
    return ViewRecipe(kind="center_crop", center_share=1.0 if info.small else 224 / 256, flip=0.0)


# ------------------------------------------------------------------------------------------- order


def shuffled_ids(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch: a permutation of all sample ids, int64 [count], the same on every rank."""
    return np.random.default_rng([seed, epoch]).permutation(count)


@lru_cache(maxsize=1)  # every epoch asks for it, of one file
def sample_pages(info: DatasetInfo) -> tuple[np.ndarray, int]:
    """The page of the file that each image is on, int64 [count], and the size of a page in bytes."""
    reader = Reader(str(info.path))
    pointers = _metadata(reader, "image")["data_ptr"]
    return (pointers // reader.page_size).astype(np.int64), int(reader.page_size)


def quasi_random_ids(pages: np.ndarray, window: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch in which images of few pages come at a time, int64 [count], the same on every rank: pages
    in random order, and the images, whose `pages` int64 [count] are given, shuffled within every `window` pages."""
    shuffled = np.random.default_rng([seed, epoch, 1]).permutation(np.unique(pages))
    place = np.empty(pages.max() + 1, dtype=np.int64)
    place[shuffled] = np.arange(len(shuffled))
    order = shuffled_ids(len(pages), seed, epoch)
    return order[np.argsort(place[pages[order]] // window, kind="stable")]


def epoch_ids(info: DatasetInfo, config: TrainDataConfig, seed: int, epoch: int) -> np.ndarray:
    """The order that the options ask for, int64 [count], a function of (seed, epoch) alone."""
    if config.order == "random":
        return shuffled_ids(info.count, seed, epoch)
    return quasi_random_ids(sample_pages(info)[0], config.window_pages, seed, epoch)


class _Readahead:
    """Has the system read the pages of images whose turn is near, whole and in the order of their first image."""

    def __init__(self, info: DatasetInfo, ids: np.ndarray, pages_ahead: int):
        pages, self._size = sample_pages(info)
        found, first = np.unique(pages[ids], return_index=True)
        order = np.argsort(first)
        self._pages, self._first = found[order], first[order]
        self._ahead, self._asked, self._done = pages_ahead, 0, 0
        self._file = open(info.path, "rb")  # noqa: SIM115  closed when the epoch is over
        self.advance(0)

    def advance(self, count: int) -> None:
        """The next `count` images have been read."""
        self._done += count
        wanted = np.searchsorted(self._first, self._done, side="right") + self._ahead
        for page in self._pages[self._asked : wanted].tolist():
            os.posix_fadvise(self._file.fileno(), page * self._size, self._size, os.POSIX_FADV_WILLNEED)
        self._asked = max(self._asked, int(wanted))

    def close(self) -> None:
        """Forget the file."""
        self._file.close()


def rank_share(batch_size: int) -> slice:
    """The part of every global batch that this rank takes; parts differ by one image at most."""
    rank, world = dist.rank(), dist.world_size()
    require(batch_size >= world, f"data.batch_size {batch_size} is smaller than the {world} processes that share it")
    return slice(batch_size * rank // world, batch_size * (rank + 1) // world)


def train_ids(order: np.ndarray, batch_size: int, first_step: int = 0) -> np.ndarray:
    """This rank's sample ids of an epoch, batch after batch, from step `first_step` of it; int64.

    Step s trains on ids [s * batch_size, (s + 1) * batch_size) of the epoch's `order`, whatever the world size. What
    remains after the last whole batch is left out.
    """
    steps = len(order) // batch_size
    batches = order[: steps * batch_size].reshape(steps, batch_size)
    return batches[first_step:, rank_share(batch_size)].reshape(-1)


# ------------------------------------------------------------------------------------------- loader


@dataclass
class Batch:
    """Images of one step on one rank, on the rank's device."""

    images: torch.Tensor
    """float32 [n, 3, size, size], normalised, channels_last."""
    labels: torch.Tensor
    """int64 [n]."""
    ids: torch.Tensor
    """Sample ids, int64 [n], on the CPU."""
    mixed: Mixed | None = None
    """What each image is mixed with, where the recipe mixes."""
    teacher_records: torch.Tensor | None = None
    """What each of the teacher's checkpoints says, as a codec keeps it: uint8 [n, members, bytes]."""

    def top1(self, answers: torch.Tensor) -> torch.Tensor:
        """100 where an answer, a class int64 [n], is the label, else 0; of a mixed image, the share of that label."""
        return over_labels(lambda labels: 100.0 * (answers == labels), self.labels, self.mixed)


class BetonLoader:
    """Batches of any sample ids of a .beton file, in any order, under any view.

    `pipeline` is FFCV's loader; `seconds_waited` adds up the time that the consumer waited for data.
    """

    def __init__(
        self,
        info: DatasetInfo,
        config: LoaderConfig,
        recipe: ViewRecipe,
        *,
        batch_size: int,
        image_size: int,
        device: torch.device,
        view_seed: int = 0,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        pages_ahead: int = 0,
    ):
        """`pages_ahead`: so many pages of the file are read before their turn, for files larger than memory."""
        self.info, self.device, self.image_size = info, device, image_size
        self.seconds_waited = 0.0
        self._pages_ahead = pages_ahead if config.os_cache else 0  # FFCV's own cache reads whole pages
        self._decoder = ViewDecoder(recipe, image_size, view_seed)
        require(
            config.os_cache or not recipe.mixes,
            "data.os_cache false reads what an epoch's order says, and mixup and cutmix need any image: leave it out",
        )
        self._labels = read_labels(info) if recipe.mixes else None
        on_gpu = device.type == "cuda"
        try:
            self.pipeline = Loader(
                str(info.path),
                batch_size=batch_size,
                num_workers=config.workers or (dist.cores_per_rank() if on_gpu else 1),
                os_cache=config.os_cache,
                order=OrderOption.SEQUENTIAL,
                drop_last=False,
                pipelines={
                    "image": [self._decoder, ToTensor()],
                    "label": [IntDecoder(), ToTensor()],
                    "id": PipelineSpec("label", decoder=SampleIdDecoder(), transforms=[ToTensor()]),
                },
            )
        except (AssertionError, ValueError, IndexError, KeyError) as error:
            raise UserError(f"{info.path} is not a .beton file that this FFCV reads ({error})") from error
        mean_, std_ = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (mean or info.mean, std or info.std))
        self._scale, self._shift = 1 / (255 * std_), -mean_ / std_
        self._copy_stream = torch.cuda.Stream(device) if on_gpu else None

    @classmethod
    def for_evaluation(
        cls, info: DatasetInfo, config: LoaderConfig, metadata: dict, device: torch.device
    ) -> BetonLoader:
        """The images of `info` as the model of a checkpoint with `metadata` is evaluated on them."""
        return cls(
            info,
            config,
            eval_recipe(info),
            batch_size=config.batch_size,
            image_size=config.image_size or metadata["image_size"],
            device=device,
            mean=metadata["mean"],
            std=metadata["std"],
        )

    def batches(
        self, ids: np.ndarray, view: int = 0, rows: Rows | None = None, image_size: int | None = None
    ) -> Iterator[Batch]:
        """Yield the samples `ids` in order under `view`, `batch_size` at a time; the last batch may be smaller. With
        `image_size` the same views, at that size.

        With `rows`, the loader's thread fetches them ahead of the consumer and `teacher_records` holds them. An error
        of the thread is raised here.
        """
        if len(ids) == 0:
            return
        self._decoder.view, self._decoder.size = view, image_size or self.image_size
        readahead = _Readahead(self.info, ids, self._pages_ahead) if self._pages_ahead else None
        epoch = Epoch(self.pipeline, ids.astype(np.uint64), partial(self._extra, view, rows, readahead))
        try:
            ahead = None
            while True:
                started = time.perf_counter()
                arrays = next(epoch, None)
                self.seconds_waited += time.perf_counter() - started
                copied = self._start_copy(arrays) if arrays is not None else None
                if ahead is not None:
                    yield self._finish(*ahead)
                if copied is None:
                    return
                ahead = copied
        finally:
            epoch.close()
            if readahead:
                readahead.close()

    def _extra(
        self, view: int, rows: Rows | None, readahead: _Readahead | None, ids: np.ndarray
    ) -> list[np.ndarray | None]:
        """What comes with the images of a batch: the other labels and the weights of mixed ones, and the rows."""
        if readahead:
            readahead.advance(len(ids))
        labels = weights = None
        if self._labels is not None:
            decoder = self._decoder
            others, weights = partners(decoder.recipe, decoder.seed, view, ids, self.info.count)
            labels = self._labels[others]
        return [labels, weights, rows(ids, view) if rows else None]

    # FFCV reuses its buffers after a few batches, so every tensor is copied off them as soon as it arrives; on a GPU
    # by a stream of its own, while the step before computes.

    def _start_copy(self, arrays) -> tuple[torch.Tensor, list[torch.Tensor | None], torch.cuda.Event | None]:
        images, labels, ids, extra = arrays
        ids = ids[:, 0].clone()
        own = [None if array is None else torch.from_numpy(array) for array in extra]
        if self._copy_stream is None:
            return ids, [images.clone(), labels[:, 0].clone(), *own], None
        with torch.cuda.stream(self._copy_stream):
            tensors = [images, labels[:, 0], *own]
            copies = [None if each is None else each.to(self.device, non_blocking=True) for each in tensors]
            event = torch.cuda.Event()
            event.record()
        return ids, copies, event

    def _finish(self, ids: torch.Tensor, tensors: list[torch.Tensor | None], event: torch.cuda.Event | None) -> Batch:
        if event is not None:
            event.synchronize()  # the copy began a step ago: this only makes sure that FFCV may reuse the buffer
            for tensor in tensors:
                if tensor is not None:
                    tensor.record_stream(torch.cuda.current_stream())
        images, labels, other_labels, weights, rows = tensors
        assert images is not None and labels is not None
        return Batch(
            images=torch.addcmul(self._shift, images.permute(0, 3, 1, 2).float(), self._scale),
            labels=labels,
            ids=ids,
            mixed=None if other_labels is None or weights is None else Mixed(other_labels, weights),
            teacher_records=rows,
        )
