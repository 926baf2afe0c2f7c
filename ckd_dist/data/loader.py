"""Data loading: batches of a .beton file on the device, normalised, with labels, sample ids and cached records."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from functools import lru_cache, partial

import numpy as np
import torch

from ckd_dist.core import dist
from ckd_dist.core.errors import UserError, require
from ckd_dist.data.batch import Batch, Mixed, Rows
from ckd_dist.data.dataset import DatasetInfo, eval_recipe
from ckd_dist.data.ffcv_repairs import Epoch, Loader, OrderOption, PipelineSpec, Reader, ToTensor
from ckd_dist.data.options import LoaderConfig, TrainDataConfig
from ckd_dist.data.order import digested_ids, part_of_order, quasi_random_ids, shuffled_ids
from ckd_dist.data.recipe import ViewRecipe
from ckd_dist.data.views.decoder import LabelDecoder, SampleIdDecoder, ViewDecoder
from ckd_dist.data.views.mixing import mixes
from ckd_dist.data.views.render import render


def read_labels(info: DatasetInfo) -> np.ndarray:
    """Class index of every sample, int64 [count], without decoding an image."""
    reader = Reader(str(info.path))
    labels = field_metadata(reader, "label").astype(np.int64).reshape(-1)
    return labels if info.label_map is None else np.array(info.label_map)[labels]


def field_metadata(reader: Reader, field: str) -> np.ndarray:
    """Metadata of a field of every sample, as FFCV's reader has it."""
    return reader.metadata[f"f{reader.field_names.index(field)}"]


def stored_images(info: DatasetInfo) -> Callable[[int], tuple[np.ndarray, np.void]]:
    """A function that reads an image, by its id, as FFCV keeps it: its bytes, uint8, and its metadata."""
    reader = Reader(str(info.path))
    fields = field_metadata(reader, "image")
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
    gives, without its thread and buffers."""
    read = stored_images(info)
    return np.stack([render(read, info.count, recipe, seed, view, int(sample), image_size) for sample in ids])


def image_digests(info: DatasetInfo, recipe: ViewRecipe, seed: int, image_size: int) -> dict[str, str]:
    """Sample id -> sha256 of its first view, uint8 [size, size, 3], for a few samples: they differ between JPEG and
    resize libraries."""
    ids = digested_ids(info.count)
    images = decode_view(info, recipe, seed, 0, ids, image_size)
    return {str(i): hashlib.sha256(image.tobytes()).hexdigest() for i, image in zip(ids, images, strict=True)}


@lru_cache(maxsize=1)  # called in every epoch, for one file
def sample_pages(info: DatasetInfo) -> tuple[np.ndarray, int]:
    """The page of the file that each image is on, int64 [count], and the size of a page in bytes."""
    reader = Reader(str(info.path))
    pointers = field_metadata(reader, "image")["data_ptr"]
    return (pointers // reader.page_size).astype(np.int64), int(reader.page_size)


class Readahead:
    """Has the kernel read the pages of the next images ahead, whole and in the order of their first image."""

    def __init__(self, info: DatasetInfo, ids: np.ndarray, pages_ahead: int):
        pages, self._size = sample_pages(info)
        found, first = np.unique(pages[ids], return_index=True)
        order = np.argsort(first)
        self._pages, self._first = found[order], first[order]
        self._ahead, self._requested, self._done = pages_ahead, 0, 0
        self._file = open(info.path, "rb")  # noqa: SIM115  closed when the epoch is over
        self.advance(0)

    def advance(self, count: int) -> None:
        """The next `count` images have been read."""
        self._done += count
        end = np.searchsorted(self._first, self._done, side="right") + self._ahead
        for page in self._pages[self._requested : end].tolist():
            os.posix_fadvise(self._file.fileno(), page * self._size, self._size, os.POSIX_FADV_WILLNEED)
        self._requested = max(self._requested, int(end))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


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
        self._label_map = None if info.label_map is None else torch.tensor(info.label_map, device=device)
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
                    "label": [LabelDecoder(), ToTensor()],
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
            eval_recipe(info, metadata.get("augment"), metadata.get("crop_share")),
            batch_size=config.batch_size,
            image_size=config.image_size or metadata.get("val_image_size", metadata["image_size"]),
            device=device,
            mean=metadata["mean"],
            std=metadata["std"],
        )

    def epoch_ids(self, config: TrainDataConfig, seed: int, epoch: int) -> np.ndarray:
        """The order of the images of an epoch by `config`, int64 [count], a function of (seed, epoch) alone; see
        `part_of_order` for those that are repeated in a step."""
        turn = epoch // config.repeats
        if config.order == "random":
            order = shuffled_ids(self.info.count, seed, turn)
        else:
            order = quasi_random_ids(sample_pages(self.info)[0], config.window_pages, seed, turn)
        return part_of_order(order, config.batch_size, config.repeats, epoch)

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
        readahead = Readahead(self.info, ids, self._pages_ahead) if self._pages_ahead else None
        epoch = Epoch(self.pipeline, ids.astype(np.uint64), partial(self._extra, view, rows, readahead))
        try:
            ahead = None
            while True:
                if ahead is not None and ahead[2] is not None:
                    ahead[2].synchronize()  # it began a step ago
                started = time.perf_counter()
                arrays = next(epoch, None)
                self.seconds_waited += time.perf_counter() - started
                copied = self._start_copy(arrays) if arrays is not None else None
                if ahead is not None:
                    yield self._batch(*ahead[:2])
                if copied is None:
                    return
                ahead = copied
        finally:
            epoch.close()
            if readahead:
                readahead.close()

    def _extra(
        self, view: int, rows: Rows | None, readahead: Readahead | None, ids: np.ndarray
    ) -> list[np.ndarray | None]:
        """What is added to the images of a batch: where the recipe mixes, second labels int64 [n] and the weights of
        the first, float32 [n]; and the rows."""
        if readahead:
            readahead.advance(len(ids))
        labels = weights = None
        if self._labels is not None:
            decoder = self._decoder
            others, weights, _ = mixes(decoder.recipe, decoder.seed, view, ids, self.info.count)
            labels = self._labels[others]
        return [labels, weights, rows(ids, view) if rows else None]

    # FFCV writes into the buffers of a batch again as soon as the next one is requested. So all of it is copied off
    # them when it arrives, on a GPU by a stream of its own while the step before computes, and that copy is waited for
    # before the next batch is requested.

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

    def _batch(self, ids: torch.Tensor, tensors: list[torch.Tensor | None]) -> Batch:
        for tensor in tensors:
            if tensor is not None and tensor.is_cuda:
                tensor.record_stream(torch.cuda.current_stream())
        images, labels, other_labels, weights, rows = tensors
        assert images is not None and labels is not None
        if self._label_map is not None:
            labels = self._label_map[labels]
        return Batch(
            images=torch.addcmul(self._shift, images.permute(0, 3, 1, 2).float(), self._scale),
            labels=labels,
            ids=ids,
            labelled=self.info.labelled,
            mixed=None if other_labels is None or weights is None else Mixed(other_labels, weights),
            teacher_records=rows,
        )
