"""A logit store, as a training loop of one's own uses it."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from ckd_dist.core.errors import require
from ckd_dist.data.batch import Mixed, normalized
from ckd_dist.data.beton_images import BetonImages
from ckd_dist.data.recipe import ViewRecipe
from ckd_dist.nn import losses
from ckd_dist.nn.options import KDConfig, LossName
from ckd_dist.store.codecs.sparse import SparseCodec
from ckd_dist.store.codecs.targets import compared_logits, require_supported
from ckd_dist.store.reader import StoreReader

if TYPE_CHECKING:
    from ckd_dist.api.views import Views

Ids = torch.Tensor | np.ndarray | Sequence[int]
"""Sample ids: integers [n]."""


def open_store(path: str | PathLike[str], checkpoints: Sequence[int | str] | None = None) -> Store:
    """Open a logit store; it needs no FFCV.

    Args:
        path: the folder that cache_logits or `ckd_dist.cache` wrote.
        checkpoints: epochs of the teacher, RUN/EPOCH for one of a run that was cached by name; default: the last.

    Raises:
        UserError: it is no store, or lacks a checkpoint.
    """
    return Store(StoreReader(str(path), list(checkpoints or [])))


class Store:
    """The logits of some of a teacher's checkpoints for every (view, image).

    It may be pickled, and so used in the workers of a DataLoader: what is mapped into memory stays behind.
    """

    def __init__(self, reader: StoreReader):
        self.reader = reader
        manifest = reader.manifest
        self.checkpoints: list[int | str] = reader.checkpoints
        """What is taught by, as it was asked for."""
        self.recipe: ViewRecipe = reader.recipe
        """How the views were drawn that the teacher saw."""
        self.seed: int = manifest.view_seed
        """Of the views."""
        self.count: int = manifest.dataset["count"]
        """Number of images."""
        self.num_classes: int = manifest.dataset["num_classes"]
        self.classes: list[str] = manifest.classes
        """Their names, if the teacher had any."""
        self.image_size: int = manifest.forward["image_size"]
        """Side of the square images that the teacher saw, in pixels; a student may see others."""
        self.mean: list[float] = manifest.forward["mean"]
        """Of pixels in [0, 1], as the teacher's images were normalised."""
        self.std: list[float] = manifest.forward["std"]
        self.transform: str | None = manifest.forward.get("transform")
        """Name of the transform that is a part of these views, if there is one: see `Views`."""

    @property
    def views(self) -> int:
        """Number of views of every image, 0 to views - 1; `distill` has epoch e train on view e mod views."""
        return self.reader.views

    def check(self, views: int | None = None) -> None:
        """Compare every shard of the first `views` (default: all) with its checksum, as `distill` does before its first
        step. Collective: ranks share the work. Raises `UserError`, on every rank, for one that is missing or bad."""
        self.reader.check_shards(views)

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Images uint8 [n, 3, size, size] as the teacher's model got them: float32 [n, 3, size, size], channels_last,
        normalised by `mean` and `std`, on the same device, with the rounding of ckd_dist's own loader."""
        return normalized(images, self.mean, self.std)

    def require_views(self, views: Views, *, student_only: str | None = None, other_pixels: bool = False) -> None:
        """Raise `UserError` unless `views` are those that the teacher saw: recipe, seed, transform, the .beton file
        by its hash where there is one and, by `Views.fingerprint`, the very pixels.

        Args:
            views: of any size; the fingerprints are made at the teacher's.
            student_only: the name of the views' transform, where the teacher did not see it: the student's images then
                differ from those that the teacher answered for.
            other_pixels: take the images' word for it that they are the store's, decoded or scaled by other means: only
                their number is compared.
        """
        require(self.count == len(views), f"views: the store has {self.count} images, these are {len(views)}")
        for name, ours, theirs in (
            ("recipe", self.recipe, views.recipe),
            ("seed", self.seed, views.seed),
        ):
            require(ours == theirs, f"views: the store has {name} {ours}, these have {theirs}: give the store's")
        require(
            self.reader.manifest.dataset.get("label_map") is None,
            "views: the store's labels were mapped by data.map_classes, these are not: use Loader",
        )
        if student_only is None or student_only != views.transform_name:
            require(
                self.transform == views.transform_name,
                f"transform_name: the store's teacher saw views with transform {self.transform}, these are with "
                f"{views.transform_name}: give the store's, or name it as student_only",
            )
            require(student_only is None, f"student_only: the views' transform is {views.transform_name}")
        else:
            require(
                self.transform is None,
                f"student_only: the store's teacher saw views with transform {self.transform}, and these lack it",
            )
        if other_pixels:
            return
        dataset = self.reader.manifest.dataset
        if isinstance(views.images, BetonImages) and dataset["content_hash"].startswith("sha256:"):
            own = views.images.info.content_hash
            require(own == dataset["content_hash"], f"views: {views.images.info.path} is not the file of the store")
        found, known = views.fingerprint(self.image_size), self.reader.manifest.images
        differ = [sample for sample, digest in found.items() if known.get(sample) != digest]
        require(
            not differ,
            f"views: image {', '.join(differ)} is another one than the store's, or was decoded or scaled by other "
            "means: give the file that the store was written from, as BetonImages, or say other_pixels=True",
        )

    def records(self, ids: Ids, view: int | torch.Tensor) -> torch.Tensor:
        """Encoded logits of images under a view, as they lie on disk: uint8 [n, checkpoints, bytes], on the CPU.

        Args:
            ids: integers [n].
            view: an integer, or integers [n], one for each image.

        Raises:
            IndexError: an image or a view that the store does not have.
            UserError: a shard is missing or damaged.
        """
        wanted, each = (np.asarray(torch.as_tensor(given).cpu(), dtype=np.int64) for given in (ids, view))
        each = np.broadcast_to(each, wanted.shape)
        if not ((each >= 0) & (each < self.views)).all():
            raise IndexError(f"views from {each.min()} to {each.max()}, the store has 0 to {self.views - 1}")
        found = np.unique(each)
        if len(found) == 1:
            return torch.from_numpy(self.reader.rows(wanted, int(found[0])))
        out = np.empty((len(wanted), len(self.checkpoints), self.reader.codec.record_bytes), dtype=np.uint8)
        for number in found.tolist():
            out[each == number] = self.reader.rows(wanted[each == number], number)
        return torch.from_numpy(out)

    def logits(self, ids: Ids, view: int | torch.Tensor) -> torch.Tensor:
        """The teacher's logits, float32 [n, checkpoints, classes], on the CPU, as far as the store's codec kept them:
        see `decode`. Arguments and errors are those of `records`."""
        return self.decode(self.records(ids, view))

    def decode(self, records: torch.Tensor) -> torch.Tensor:
        """Logits of `records`, uint8 [n, checkpoints, bytes]: float32 [n, checkpoints, classes] on the same device.

        A dense store has them as they were, rounded to its type. Of a sparse one, the softmax of the logits is the
        teacher's as far as it was kept, at T = 1 or, where classes were drawn at random, at the temperature of the
        draw; `loss` knows more of such a store than these logits show.
        """
        members = [
            codec.decode(member, getattr(codec, "temperature", 1.0))
            for codec, member in zip(self.reader.codecs, records.unbind(dim=1), strict=True)
        ]
        return torch.stack(members, dim=1)

    def loss(
        self,
        student_logits: torch.Tensor,
        ids: Ids,
        view: int | torch.Tensor,
        labels: torch.Tensor,
        loss: LossName = "kd",
        *,
        alpha: float = 0.5,
        temperature: float = 5.0,
        beta: float = 8.0,
        label_smoothing: float = 0.0,
        mixed: Mixed | tuple[torch.Tensor, torch.Tensor] | None = None,
        combine: Literal["logits", "probabilities"] = "logits",
        weights: Sequence[float] | None = None,
        records: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What `distill` minimises, of each image, in nats, float32 [n]: alpha times the cross entropy of the label
        and 1 - alpha times the distillation loss. The mean over the batch is the loss of a step.

        Args:
            student_logits: float [n, classes], with the gradient.
            ids: sample ids, integers [n].
            view: the view that the student saw, an integer or integers [n].
            labels: int64 [n], on the device of the logits.
            loss: kd, soft_target, mse, dkd, dist or standardized, as `distill --kd.loss`.
            alpha: weight of the label's cross entropy, 0 to 1.
            temperature: T of both softmaxes.
            beta: dkd: weight of the classes other than the label's.
            label_smoothing: share of the label's probability that is spread over all classes.
            mixed: where the recipe mixes, (label of the other image int64 [n], weight of the own label float32 [n]).
            combine: how several checkpoints are averaged.
            weights: of the checkpoints; default: equal.
            records: of these images, where they were fetched already, as `records` gives them.

        Raises:
            UserError: a value out of its range, a loss that the store's codec cannot serve, a mixed image without its
                second label.
            IndexError: as `records`.
        """
        config = KDConfig(loss=loss, alpha=alpha, temperature=temperature, beta=beta)
        codec = self.reader.codec
        require_supported(codec, config, combine if len(self.checkpoints) > 1 else None)
        self._require_fitting(loss, mixed is not None, weights)
        if records is None:
            records = self.records(ids, view)
        records = records.to(student_logits.device, non_blocking=True)
        student = student_logits.float()
        shares = None if weights is None else [weight / sum(weights) for weight in weights]
        ours, teacher, _ = compared_logits(
            self.reader.codecs, records, config, student, weights=shares, combine=combine
        )
        second = None if mixed is None else Mixed(*mixed)
        return losses.distillation(student, teacher, labels, config, label_smoothing, second, ours)["loss"]

    def _require_fitting(self, loss: LossName, mixed: bool, weights: Sequence[float] | None) -> None:
        """Raise `UserError` where arguments of `loss` do not fit the store."""
        require(
            self.recipe.mixes == mixed,
            "mixed: the store's images are mixed of two, give the second labels and the weights of the first"
            if self.recipe.mixes
            else "mixed: the store's images are not mixed: leave it out",
        )
        require(
            loss != "dkd" or not mixed or not isinstance(self.reader.codec, SparseCodec),
            "loss dkd needs the teacher's logits of both labels of a mixed image, and a sparse store keeps the first "
            "one's: use a store of codec dense",
        )
        require(
            weights is None or len(weights) == len(self.checkpoints),
            f"weights: {len(weights or ())} values for {len(self.checkpoints)} checkpoints",
        )
