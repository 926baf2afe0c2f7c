"""What data sets give as an image, as pixels: without FFCV, and the ones that FFCV would see."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np

from ckd_dist.core.errors import UserError


def pixels(image: Any, name: str) -> np.ndarray:
    """An image as uint8 [height, width, 3].

    A JPEG file's bytes, or its path, are decoded as FFCV decodes them; other files by PIL. A PIL image, and an array or
    tensor uint8 [height, width], [height, width, 3] or, of a tensor, [3, height, width], is taken as it is; grey has
    three equal channels. Raises `UserError`, with the image's `name`, for what is none of these.
    """
    if isinstance(image, (str, os.PathLike)):
        name, path = f"{name} ({os.fspath(image)})", Path(image)
        try:
            image = path.read_bytes()
        except OSError as error:
            raise UserError(f"{name} cannot be read ({error.strerror})") from None
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _decode(bytes(image), name)
    if hasattr(image, "convert"):  # PIL's, which is not imported for this
        image = image if image.mode == "RGB" else image.convert("RGB")
    elif hasattr(image, "detach"):
        image = image.detach().cpu()
        image = image.permute(1, 2, 0) if image.ndim == 3 and image.shape[0] == 3 else image
    found = np.asarray(image)
    if found.ndim == 2:
        found = np.repeat(found[:, :, None], 3, axis=2)
    if found.dtype != np.uint8 or found.ndim != 3 or found.shape[2] != 3 or not found.size:
        raise UserError(
            f"{name} is {found.dtype} {list(found.shape)}: give a PIL image, uint8 [height, width, 3], or a file's "
            "bytes or path, before any transform"
        )
    return np.ascontiguousarray(found)


def _decode(data: bytes, name: str) -> np.ndarray:
    try:
        if data[:3] != b"\xff\xd8\xff":
            from PIL import Image

            return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        import simplejpeg

        # FFCV decodes with libjpeg-turbo's fast DCT: any other way gives other pixels.
        return simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=True, fastupsample=False)
    except ImportError:
        raise UserError(f"{name} needs simplejpeg, which is not installed: pip install 'ckd_dist[views]'") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{name} cannot be decoded ({error}): repair or remove it") from None
