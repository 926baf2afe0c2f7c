"""Image folders of photographs that are drawn, not taken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_photographs(root: Path, counts: dict[str, int], seed: int = 0) -> None:
    """An image folder: smooth, noisy JPEG photographs of different sizes, one colour range a class."""
    rng = np.random.default_rng(seed)
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            height, width = rng.integers(40, 120, 2)
            y, x = np.mgrid[0:height, 0:width]
            wave = np.sin(x / (3 + 4 * label) + rng.uniform(0, 6)) * np.cos(y / (5 + 3 * label))
            image = 128 + 90 * wave[..., None] * np.roll([1.0, 0.3, -0.6], label) + rng.normal(0, 8, (height, width, 3))
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(root / name / f"{i:03d}.jpg", quality=92)
