"""How views are drawn, as a store's manifest records it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class ViewRecipe:
    """How a view is drawn; equal recipes and seeds give equal images.

    An image is cropped, mirrored, its colours changed, a part of it erased, and the whole then mixed with another image
    of the file that went through the same: one that no order of the images has to bring near, since a decoder reaches
    every sample.
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

    @property
    def mixes(self) -> bool:
        """Whether images are mixed of two."""
        return bool(self.mixup or self.cutmix)

    def to_dict(self) -> dict:
        """As plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict) -> ViewRecipe:
        """Inverse of `to_dict`."""
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**arguments)
