"""Datasets that come as arrays: (stacked) Fashion-MNIST and CIFAR, downloaded by torchvision unless they are there."""

import gzip
import itertools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import InputError
from data_prep.sources.decoding import Check

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
STACK_SEED = 20221130
FASHION_MNIST_CLASSES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]


@dataclass(frozen=True)
class ArraySource:
    """Images of one size, in memory.

    Raises `InputError` where there are none, or a label is none of the classes.

    Attributes:
        images: uint8 [N, height, width, 3], or [N, height, width] for grey ones, which become RGB.
        labels: int64 [N].
        classes: name of each class.
        where: the file or folder they came from, for messages.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: list[str]
    where: str

    def __post_init__(self) -> None:
        if self.labels.ndim != 1 or len(self.images) != len(self.labels) or not len(self.labels):
            raise InputError(
                f"{self.where}: {self.images.shape} images do not go with {self.labels.shape} labels: get it anew"
            )
        for label in (self.labels.min(), self.labels.max()):
            if not 0 <= label < len(self.classes):
                raise InputError(
                    f"{self.where}: label {label} beside it is none of the {len(self.classes)} classes: get both anew"
                )

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int, check: Check) -> tuple[NDArray[np.uint8], int]:
        """An image and its label; there is nothing to decode, and so to `check`."""
        image = self.images[index]
        if image.ndim == 2:
            image = np.repeat(image[:, :, None], 3, axis=2)
        return image, int(self.labels[index])

    def name(self, index: int) -> str:
        """What messages call an image."""
        return f"{self.where}, image {index}"

    def identity(self) -> Iterator[bytes]:
        """What tells this source from others, in pieces: shape, labels and pixels."""
        yield str(self.images.shape).encode()
        yield self.labels.astype("<i8").tobytes()
        yield self.images.tobytes()

    @property
    def max_side(self) -> int | None:
        """The longest side of any image, in pixels; None where only reading every file could tell."""
        return max(self.images.shape[1:3])


def fashion_mnist(root: Path | None, train: bool) -> ArraySource:
    """From the IDX files in `root`, else torchvision's download there; without a `root`, from Debian's package."""
    prefix = "train" if train else "t10k"
    names = [f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"]
    folders = [root, root / "FashionMNIST" / "raw"] if root else [DEBIAN_FASHION_MNIST]
    files = _find_idx(folders, names)
    if files is None:
        if root is None:
            raise InputError(
                f"--root: Fashion-MNIST is not in {DEBIAN_FASHION_MNIST} (Debian package "
                "dataset-fashion-mnist); name a folder to download it into"
            )
        from torchvision.datasets import FashionMNIST

        _download(FashionMNIST, root, train)
        files = _find_idx(folders, names)
        assert files is not None
    images, labels = read_idx(files[0]), read_idx(files[1])
    if images.ndim != 3:
        raise InputError(f"{files[0]}: {images.shape} values are no grey images: get it anew")
    return ArraySource(images, labels.astype(np.int64), list(FASHION_MNIST_CLASSES), str(files[0]))


def stacked_fashion_mnist(root: Path | None, train: bool) -> ArraySource:
    """A thousand classes from ten: each image has three of Fashion-MNIST's, drawn at random, as its red, green and blue
    channel, and their classes as the digits of its own. Every image of Fashion-MNIST is used once, so that held-out
    images share nothing with the others. (After Stacked MNIST, Metz et al., arXiv 1611.02163.)"""
    grey = fashion_mnist(root, train)
    threes = np.random.RandomState(STACK_SEED).permutation(len(grey) // 3 * 3).reshape(-1, 3)
    images = np.ascontiguousarray(grey.images[threes].transpose(0, 2, 3, 1))
    classes = [", ".join(names) for names in itertools.product(grey.classes, repeat=3)]
    return ArraySource(images, grey.labels[threes] @ np.array([100, 10, 1]), classes, grey.where)


def _find_idx(folders: list[Path], names: list[str]) -> list[Path] | None:
    """The files of these names, gzipped or not, in the first folder that holds them all."""
    for folder in folders:
        found = [path for name in names for path in (folder / name, folder / f"{name}.gz") if path.is_file()]
        if {path.name.removesuffix(".gz") for path in found} == set(names):
            return [next(path for path in found if path.name.startswith(name)) for name in names]
    return None


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The array in an IDX file of unsigned bytes (http://yann.lecun.com/exdb/mnist), gzipped or not.

    Raises:
        InputError: damaged, truncated, or no such file.
    """
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error}): get it anew") from error
    ndim = data[3] if data[:3] == b"\0\0\x08" and len(data) > 3 else 0
    start = 4 + 4 * ndim
    shape = np.frombuffer(data[4:start], ">u4").tolist()
    if not ndim or len(data) != start + int(np.prod(shape, dtype=np.int64)):
        raise InputError(f"{path}: not a whole IDX file of unsigned bytes: get it anew")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def cifar10(root: Path, train: bool) -> ArraySource:
    """torchvision's CIFAR-10, downloaded into `root` unless it is there."""
    from torchvision.datasets import CIFAR10

    return _cifar(CIFAR10, root, train)


def cifar100(root: Path, train: bool) -> ArraySource:
    """torchvision's CIFAR-100, downloaded into `root` unless it is there."""
    from torchvision.datasets import CIFAR100

    return _cifar(CIFAR100, root, train)


def _cifar(dataset: type[Any], root: Path, train: bool) -> ArraySource:
    data = _download(dataset, root, train)
    return ArraySource(data.data, np.array(data.targets, np.int64), list(data.classes), str(root))


def _download(dataset: type[Any], root: Path, train: bool) -> Any:
    """The dataset of this class of torchvision's from `root`, downloaded into it unless it is there."""
    try:
        return dataset(str(root), train=train, download=True)
    except Exception as error:  # URLError, OSError, RuntimeError, ...: whatever went wrong on the way
        raise InputError(
            f"--root {root}: {dataset.__name__} is not there whole, and its download failed ({error}): "
            "get a network, or copy torchvision's files there"
        ) from error
