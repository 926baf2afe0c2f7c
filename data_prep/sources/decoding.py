"""Opened image files to pixels: any mode that PIL reads, as 8-bit RGB."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps

from data_prep.errors import InputError

MAX_PIXELS = 178_956_970  # twice PIL's MAX_IMAGE_PIXELS, where it refuses by itself

Check = Callable[[int, int], None]
"""Called with the (height, width) that a picture is about to be decoded to; raises where it could not be stored."""


@dataclass(frozen=True)
class Decoding:
    """How image files become pixels.

    Attributes:
        max_resolution: longest side in pixels that is wanted, if any.
        max_pixels: a picture that has more is decoded at a reduced scale, where its format and `max_resolution` allow
            that, and refused elsewhere.
        integer_range: the value of white where integers of more than 8 bits leave it open; None: these are refused.
        exif_transpose: turn a picture as its EXIF orientation says.
    """

    max_resolution: int | None = None
    max_pixels: int = MAX_PIXELS
    integer_range: int | None = None
    exif_transpose: bool = False


def decode(image: ImageFile.ImageFile, decoding: Decoding, check: Check) -> NDArray[np.uint8]:
    """Pixels of an opened image of any mode as uint8 [height, width, 3].

    As torchvision's loader does, an alpha channel is dropped, and EXIF orientation is ignored unless asked for (PIL by
    itself turns TIFFs). Unlike it, integers of more than 8 bits are scaled to 8, where PIL would clip them to white.

    Raises:
        InputError: a picture that needs another option.
        ValueError: floating-point pixels or negative ones, whose range nobody can guess.
        OSError: a truncated or damaged file.
    """
    layout = str(image.tile)  # how a pixel lies in the file, gone after decoding
    picture = _within_limit(image, decoding, check)
    if decoding.exif_transpose:
        ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode == "F":
        raise ValueError("floating-point pixels have no known range; save it with 8 bits a channel")
    if picture.mode.startswith("I"):
        scaled_by_pil = image.format in ("PPM", "JPEG2000")  # from the range that the file names
        white = 4095 if ";12" in layout else 65535 if scaled_by_pil else decoding.integer_range
        sixteen_bits = picture.mode != "I" or image.format == "PNG"  # older versions of PIL have 16-bit PNGs as I
        grey = _eight_bits(np.asarray(picture), white, sixteen_bits)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # straight to RGB, PIL warns
    pixels = np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))
    if ";16" in layout and decoding.integer_range != 65535 and pixels.max() < 128:
        raise InputError(
            f"16 bits a channel, of which PIL keeps the upper 8, and they reach {pixels.max()} only: say "
            "--integer-range 65535, if that is white, or save it with 8 bits a channel"
        )
    return pixels


def _within_limit(image: ImageFile.ImageFile, decoding: Decoding, check: Check) -> Image.Image:
    """The opened image, if it has at most `max_pixels`, not decoded yet; else decoded at a reduced scale and brought to
    the size that FFCV would scale it down to."""
    width, height = image.size
    size = None
    if width * height > decoding.max_pixels and decoding.max_resolution:
        ratio = decoding.max_resolution / max(width, height)
        size = max(1, int(ratio * width)), max(1, int(ratio * height))
        image.draft(None, size)  # does nothing where the format allows nothing
    if image.width * image.height > decoding.max_pixels:
        smaller = ", or give a smaller --max-resolution" if image.format in ("JPEG", "MPO") else ""
        raise InputError(
            f"{height} x {width} pixels, more than --max-pixels {decoding.max_pixels}: if it is no decompression bomb, "
            f"raise that to {image.width * image.height} (a worker takes 7 bytes a pixel){smaller}"
        )
    check(image.height, image.width)
    return image.resize(size, Image.Resampling.BOX) if size else image


def _eight_bits(pixels: NDArray, white: int | None, sixteen_bits: bool) -> NDArray[np.uint8]:
    """Integers of any type, 0 to `white`, as 0 to 255; without `white`, 16 bits are told by a value that needs them.

    Raises:
        InputError: values beyond `white`, or no `white` where there are several possible ones.
        ValueError: negative values.
    """
    low, top = int(pixels.min()), int(pixels.max())
    if low < 0:
        raise ValueError(f"pixels down to {low}; save it with 8 bits a channel")
    if white is None and (top == 0 or (sixteen_bits and top >= 1 << 15)):
        white = 65535
    if white is None:
        guess = next((white for white in (255, 4095, 65535) if white >= top), top)
        raise InputError(
            f"integer pixels up to {top}, and nothing says which value is white: give it, "
            f"e.g. --integer-range {guess}, or save it with 8 bits a channel"
        )
    if top > white:
        raise InputError(f"integer pixels up to {top}, beyond --integer-range {white}: give the value of white")
    return ((pixels.astype(np.int64) * 255 + white // 2) // white).astype(np.uint8)
