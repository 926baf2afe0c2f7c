"""The views of a store without FFCV: a data set for PyTorch's DataLoader, and the order of an epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from ckd_dist.core import dist
from ckd_dist.core.errors import require
from ckd_dist.data.order import digested_ids, shuffled_ids, train_ids
from ckd_dist.data.pixels import pixels
from ckd_dist.data.recipe import ViewRecipe
from ckd_dist.data.views.draws import stream_key
from ckd_dist.data.views.mixing import blend, draw_mix
from ckd_dist.data.views.parameters import parameters
from ckd_dist.data.views.replay import replay


class Images(Protocol):
    """A map-style data set of (image, label), as torchvision's are without a transform; what an image may be, `pixels`
    says."""

    def __len__(self) -> int:
        """Number of images."""
        ...

    def __getitem__(self, index: int, /) -> tuple[Any, int]:
        """Image `index` and its class."""
        ...


class Views(Dataset):
    """The views of images, byte for byte those of the FFCV loader where the images are: a map-style data set.

    Its index is (view, image), as `ViewSampler` gives it: so the view travels to the workers of a DataLoader, also to
    persistent ones, for whom a view that is set on the data set would stay the first one.
    """

    def __init__(
        self,
        images: Images,
        recipe: ViewRecipe,
        *,
        seed: int,
        size: int,
        transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
        transform_name: str | None = None,
    ):
        """Views of `images` by `recipe` and `seed`, a store's mostly, at `size` pixels.

        Args:
            images: a data set of (image, label); for JPEG images their bytes or paths, or `BetonImages`: PIL's pixels
                of the same file differ a little.
            recipe: how views are drawn.
            seed: of the views.
            size: side of the square images, in pixels; no draw depends on it.
            transform: applied to every finished view, uint8 [3, size, size]. What it draws from torch's global
                generator is a function of (seed, view, image); it must draw from nowhere else.
            transform_name: its name, which stands for it in a store's identity: another function, or other parameters,
                need another name. See `Store.require_views`.

        Raises:
            UserError: a transform without a name, or the reverse.
        """
        require(
            (transform is None) == (not transform_name),
            "transform_name: give transform and its name together: the name stands for it in a store's identity",
        )
        self.images, self.recipe, self.seed, self.size = images, recipe, seed, size
        self.transform, self.transform_name = transform, transform_name
        self._values = parameters(recipe)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: tuple[int, int]) -> dict[str, Any]:
        """View `view` of image `i`, for the index (view, i).

        Returns a dict: `image` uint8 [3, size, size], `label` int, `id` int and `view` int; where the recipe mixes,
        also `other_label`, the class of the image mixed in, and `weight`, a float32: how much the own label counts.
        A DataLoader makes tensors of them.

        Raises:
            UserError: the image is none.
        """
        view, sample = (int(each) for each in index)
        image, labels = self._view(view, sample, self.size)
        shown = torch.from_numpy(image).permute(2, 0, 1)
        if self.transform is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(stream_key(self.seed, view, sample)) % 2**63)
                shown = self.transform(shown)
        return {"image": shown.contiguous(), **labels, "id": sample, "view": view}

    def _view(self, view: int, sample: int, size: int) -> tuple[np.ndarray, dict[str, Any]]:
        """Before the transform: uint8 [size, size, 3], and the entries of an item that tell its labels."""
        image, label = self._unmixed(view, sample, size)
        labels: dict[str, Any] = {"label": label}
        if self.recipe.mixes:
            partner, weight, box = draw_mix(self.seed, view, sample, len(self), self._values)
            if weight < 1:
                other, other_label = self._unmixed(view, int(partner), size)
                blend(image, other, weight, box)
            else:  # its label is all that is wanted of it
                other_label = label if partner == sample else int(self.images[int(partner)][1])
            labels.update(other_label=other_label, weight=np.float32(weight))
        return image, labels

    def _unmixed(self, view: int, sample: int, size: int) -> tuple[np.ndarray, int]:
        """Not mixed: uint8 [size, size, 3], and the label."""
        image, label = self.images[sample]
        name = f"images: image {sample}"
        return replay(pixels(image, name), self._values, self.seed, view, sample, size), int(label)

    def fingerprint(self, size: int | None = None) -> dict[str, str]:
        """Sample id -> sha256 of its first view, uint8 [size, size, 3], for four images: what a store keeps of its own.

        Other images, another recipe or seed, and another JPEG decoder or resize library give other ones; the transform
        is no part of it. `size` defaults to that of these views.
        """
        found = {}
        for sample in digested_ids(len(self)).tolist():
            image, _ = self._view(0, sample, size or self.size)
            found[str(sample)] = hashlib.sha256(image.tobytes()).hexdigest()
        return found


class ViewSampler(Sampler[tuple[int, int]]):
    """The (view, image) of an epoch on this rank, in the order that `distill` has for the same seed.

    Epoch e is view e mod `views` of all images, shuffled by (seed, e); step s trains on the same images whatever the
    number of ranks, each of which takes its share of every batch; what remains after the last whole batch is left out.
    """

    def __init__(self, count: int, *, views: int, batch_size: int, seed: int = 0):
        """For `count` images, in batches of `batch_size` over all ranks: the DataLoader gets `rank_batch_size`."""
        require(batch_size <= count, f"batch_size {batch_size} is larger than the {count} images")
        self.count, self.views, self.batch_size, self.seed = count, views, batch_size, seed
        self.epoch = self.first_step = 0

    @property
    def rank_batch_size(self) -> int:
        """Images of each step on this rank. Raises `UserError` where ranks cannot have equal shares."""
        world = dist.world_size()
        require(
            self.batch_size % world == 0,
            f"batch_size {self.batch_size} cannot be shared equally by {world} processes: give a multiple",
        )
        return self.batch_size // world

    def set_epoch(self, epoch: int) -> None:
        """Have the next iteration give epoch `epoch`, from its first step on, or, of the epoch that `load_state_dict`
        told, from the first step that is still to be taken."""
        if epoch != self.epoch:
            self.epoch, self.first_step = epoch, 0

    def state_dict(self, step: int | None = None) -> dict[str, int]:
        """Where a training stands after `step` steps of this epoch. The loop has to tell it, since workers fetch ahead
        of it; default: where this epoch was begun."""
        return {**self._identity, "epoch": self.epoch, "step": self.first_step if step is None else step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state_dict` was called; raises `UserError` where that was another training."""
        for name, own in self._identity.items():
            require(state[name] == own, f"{name}: the training had {state[name]}, this sampler has {own}: give that")
        self.epoch, self.first_step = state["epoch"], state["step"]

    @property
    def _identity(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("count", "views", "batch_size", "seed")}

    def __iter__(self) -> Iterator[tuple[int, int]]:
        assert self.rank_batch_size
        ids = train_ids(shuffled_ids(self.count, self.seed, self.epoch), self.batch_size, self.first_step)
        view = self.epoch % self.views
        return iter([(view, sample) for sample in ids.tolist()])

    def __len__(self) -> int:
        return (self.count // self.batch_size - self.first_step) * self.rank_batch_size
