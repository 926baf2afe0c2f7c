"""Encoded images of any size, as files of their own or packed into larger ones."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from os import fsencode
from typing import IO, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.sources.decoding import Check, Decoding, decode


class Storage(Protocol):
    """Where the bytes of N images lie."""

    def open(self, index: int) -> str | IO[bytes]:
        """The path of an image, or its content; raises OSError or `InputError`."""

    def name(self, index: int) -> str:
        """What messages call an image."""


@dataclass(frozen=True)
class FileSource:
    """Image files of any size.

    Attributes:
        storage: where they lie.
        names: N names that tell them from each other, the same however they are stored: below the root of class folders
            where there are any.
        labels: int64 [N]; zeros where there are none.
        classes: name of each class; empty where images have no labels.
        left_out: how many files and folders of each kind lie between them and are not among them.
        decoding: how they become pixels.
        found: what they were read from, where there are several possibilities.
    """

    storage: Storage
    names: list[str]
    labels: NDArray[np.int64]
    classes: list[str]
    left_out: Counter[str]
    decoding: Decoding = field(default_factory=Decoding)
    found: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int, check: Check) -> tuple[NDArray[np.uint8], int]:
        """An image and its label. PIL's own limit of pixels must be off.

        Raises what PIL raises (OSError, ValueError, SyntaxError, ...) for a file that it cannot read, `InputError`,
        without the file's name, for one that needs another option, and whatever `check` raises.
        """
        with Image.open(self.storage.open(index)) as image:
            return decode(image, self.decoding, check), int(self.labels[index])

    def name(self, index: int) -> str:
        """What messages call an image."""
        return self.storage.name(index)

    def identity(self) -> Iterator[bytes]:
        """What tells this source from others, in pieces: each image's class and its name."""
        classes = [name.encode() for name in self.classes] or [b""]
        for name, label in zip(self.names, self.labels.tolist(), strict=True):
            yield classes[label] + b"\0" + fsencode(name) + b"\0"

    @property
    def max_side(self) -> int | None:
        """The longest side of any image, in pixels; None where only reading every file could tell."""
        return None
