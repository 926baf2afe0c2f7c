"""How views are drawn, as a store's manifest records it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from ckd_dist.core.errors import require

Policy = Literal["trivial_augment", "rand_augment", "auto_augment", "three_augment"]
MAX_OPERATIONS, MAX_MAGNITUDE = 16, 30


@dataclass(frozen=True, kw_only=True)
class ViewRecipe:
    """How a view is drawn; equal recipes and seeds give equal images.

    An image is cropped, mirrored, changed by a policy, its colours changed, made grey, blurred, solarised, a part of it
    erased, and the whole then mixed with another image of the file that went through the same: one that no order of the
    images has to bring near, since a decoder reaches every sample.
    """

    __pydantic_config__ = {"extra": "forbid"}

    kind: Literal["random_resized_crop", "pad_crop", "center_crop"]
    """random_resized_crop for photographs, pad_crop for small images of one size, center_crop for evaluation."""
    scale: tuple[float, float] = (0.08, 1.0)
    """random_resized_crop: range of the crop's share of the area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """random_resized_crop: range of the crop's width over height."""
    padding: int = 4
    """pad_crop: black pixels added on each side before a crop of the image's own size."""
    center_share: float = 1.0
    """center_crop: side of the square as a share of the image's shorter side."""
    flip: float = 0.5
    """Probability of a mirrored view."""
    color_jitter: float = 0.0
    """Brightness, contrast and saturation, in this order, are each multiplied by a factor within this of 1."""
    erase: float = 0.0
    """Probability that a box is filled with one random colour; its size and shape as Zhong et al., "Random Erasing Data
    Augmentation" (arXiv 1708.04896)."""
    mixup: float = 0.0
    """Alpha: each image is blended with another by a weight from Beta(alpha, alpha); 0: never. Zhang et al. (arXiv
    1710.09412)."""
    cutmix: float = 0.0
    """Alpha: a box of each image shows another; its area is such a weight; 0: never. Yun et al. (arXiv 1905.04899).
    With mixup too, either takes half of the images."""
    policy: Policy | None = None
    """Operations that a published policy draws, as torchvision has them. trivial_augment: one of 14 at any strength
    (arXiv 2103.10158, wide); rand_augment: `operations` of them at `magnitude` (arXiv 1909.13719); auto_augment: one of
    25 pairs, ImageNet's (arXiv 1805.09501); three_augment: grey, solarised or blurred (DeiT III, arXiv 2204.07118)."""
    operations: int = 2
    """rand_augment: operations, one after another."""
    magnitude: int = 9
    """rand_augment: their strength, 0 to 30."""
    grayscale: float = 0.0
    """Probability that the colours are taken away."""
    blur: float = 0.0
    """Probability of a Gaussian blur. Its deviation is any from 0.1 to 2 pixels of a view of 224: a share of the side,
    so that a view is as blurred at every size."""
    solarize: float = 0.0
    """Probability that values of 128 and more are inverted."""
    mix: float = 1.0
    """Probability that an image is mixed at all, where there is mixup or cutmix."""

    def __post_init__(self) -> None:
        # Compiled code reads tables at these numbers, and checks no bounds.
        require(1 <= self.operations <= MAX_OPERATIONS, f"recipe: operations is {self.operations}: give 1 to 16")
        require(0 <= self.magnitude <= MAX_MAGNITUDE, f"recipe: magnitude is {self.magnitude}: give 0 to 30")

    @property
    def mixes(self) -> bool:
        """Whether images are mixed of two."""
        return bool(self.mixup or self.cutmix)

    def to_dict(self) -> dict:
        """As plain JSON values. What a newer version can draw is left out where it is not drawn: so a recipe that an
        older version knows has the text, and a store the identity, that it had there, and older versions refuse what
        they cannot draw."""
        newer = {field.name: field.default for field in fields(self) if field.name in _NEWER}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
            if name not in newer or value != newer[name]
        }

    @classmethod
    def from_dict(cls, values: dict) -> ViewRecipe:
        """Inverse of `to_dict`."""
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**arguments)


_NEWER = ("policy", "operations", "magnitude", "grayscale", "blur", "solarize", "mix")
"""Fields that manifests of older versions do not have."""
