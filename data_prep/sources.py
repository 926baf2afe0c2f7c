"""Datasets as indexable sources: `source[i]` is (uint8 RGB array [height, width, 3], class index)."""

import gzip
import itertools
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import Image

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
STACK_SEED = 20221130
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp")

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

# (mean, deviation) of R, G and B for pixels in [0, 1], as published with each dataset's common recipes.
_IMAGENET_NORMALIZATION = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
NORMALIZATION: dict[str, tuple[list[float], list[float]]] = {
    "fashion_mnist": ([0.2860] * 3, [0.3530] * 3),
    "stacked_fashion_mnist": ([0.2860] * 3, [0.3530] * 3),
    "cifar10": ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
    "cifar100": ([0.5071, 0.4867, 0.4408], [0.2675, 0.2565, 0.2761]),
    "tiny_imagenet": ([0.4802, 0.4481, 0.3975], [0.2770, 0.2691, 0.2821]),
    "imagenet": _IMAGENET_NORMALIZATION,
    "imagefolder": _IMAGENET_NORMALIZATION,
}


class InputError(ValueError):
    """Something the user can mend. The message is the one line to show: it names the option or file."""


@dataclass(frozen=True)
class ArraySource:
    """Images of one size, in memory.

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

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        image = self.images[index]
        if image.ndim == 2:
            image = np.repeat(image[:, :, None], 3, axis=2)
        return image, int(self.labels[index])

    def name(self, index: int) -> str:
        return f"{self.where}, image {index}"

    @property
    def max_side(self) -> int | None:
        """The longest side of any image, in pixels; None where only reading every file could tell."""
        return max(self.images.shape[1:3])


@dataclass(frozen=True)
class FileSource:
    """Image files of any size.

    Attributes:
        paths: N files.
        labels: int64 [N].
        classes: name of each class.
    """

    paths: list[str]
    labels: NDArray[np.int64]
    classes: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        """Raises what PIL raises (OSError, ValueError, SyntaxError, ...) for a file that it cannot read."""
        with Image.open(self.paths[index]) as image:
            return to_rgb(image), int(self.labels[index])

    def name(self, index: int) -> str:
        return self.paths[index]

    @property
    def max_side(self) -> int | None:
        """The longest side of any image, in pixels; None where only reading every file could tell."""
        return None


Source = ArraySource | FileSource


def to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Pixels of an image of any mode as uint8 [height, width, 3].

    As torchvision's loader does: no EXIF rotation, and an alpha channel is dropped. Unlike it, 16-bit grey is
    scaled to 8 bits, where PIL would clip it to white.

    Raises:
        ValueError: floating-point pixels, or integers beyond 16 bits, whose range nobody can guess.
        OSError: a truncated or damaged file.
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save it with 8 bits a channel")
    if image.mode.startswith("I"):
        grey = np.array(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("pixels beyond 16 bits; save it with 8 bits a channel")
        return np.repeat((grey >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB, PIL warns
    return np.array(image.convert("RGB"))


def load_source(dataset: str, root: Path | None, train: bool) -> Source:
    """The training or test images of a dataset, in an order that depends on the files' names only.

    Args:
        dataset: a key of `NORMALIZATION`.
        root: folder of the dataset; None for (stacked) Fashion-MNIST from Debian's package.
        train: the training images, or the test images (official validation set of ImageNet and
            Tiny-ImageNet). For imagefolder both are the whole tree.

    Raises:
        InputError: a missing folder, a wrong layout, an empty class, a damaged archive, a failed download.
    """
    if root is None and not dataset.endswith("fashion_mnist"):
        raise InputError(f"--root: {dataset} needs a folder to read from, e.g. --root data/{dataset}")
    if root is not None and not root.is_dir():
        hint = "; the dataset is downloaded into it" if dataset in _DOWNLOADED else ""
        raise InputError(f"--root {root}: no such folder: correct it, or make it (mkdir -p {root}){hint}")
    return _LOADERS[dataset](root, train)


# --- Fashion-MNIST and CIFAR: arrays ------------------------------------------------------------------


def _fashion_mnist(root: Path | None, train: bool) -> ArraySource:
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
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise InputError(f"{files[0]}: {images.shape} images do not go with {labels.shape} labels: get it anew")
    if labels.max() >= len(FASHION_MNIST_CLASSES):
        raise InputError(f"{files[1]}: label {labels.max()} is none of Fashion-MNIST's 10 classes: get it anew")
    return ArraySource(images, labels.astype(np.int64), list(FASHION_MNIST_CLASSES), str(files[0]))


def _stacked_fashion_mnist(root: Path | None, train: bool) -> ArraySource:
    """A thousand classes from ten: each image has three of Fashion-MNIST's, drawn at random, as its red, green and blue
    channel, and their classes as the digits of its own. Every image of Fashion-MNIST is used once, so that held-out
    images share nothing with the others. (After Stacked MNIST, Metz et al., arXiv 1611.02163.)"""
    grey = _fashion_mnist(root, train)
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


def _cifar(dataset: str, root: Path, train: bool) -> ArraySource:
    from torchvision import datasets

    data = _download(datasets.CIFAR10 if dataset == "cifar10" else datasets.CIFAR100, root, train)
    return ArraySource(data.data, np.array(data.targets, np.int64), list(data.classes), str(root))


def _download(dataset: Callable, root: Path, train: bool):
    """A torchvision dataset from `root`, downloaded into it unless it is there."""
    try:
        return dataset(str(root), train=train, download=True)
    except Exception as error:  # URLError, OSError, RuntimeError, ...: whatever went wrong on the way
        name = getattr(dataset, "__name__", "the dataset")
        raise InputError(
            f"--root {root}: {name} is not there whole, and its download failed ({error}): "
            "get a network, or copy torchvision's files there"
        ) from error


# --- Trees of image files -----------------------------------------------------------------------------


def _imagefolder(root: Path, train: bool) -> FileSource:
    classes = _subfolders(root)
    if not classes:
        raise InputError(f"--root {root}: no class folders there; the layout is {root}/<class>/**/*.jpg")
    splits = {"train", "val", "valid", "validation", "test"}
    if set(classes) <= splits:
        raise InputError(
            f"--root {root}: its folders are splits, not classes ({', '.join(classes)}): "
            f"name one of them, e.g. --root {root / classes[0]}"
        )
    return _file_source({name: root / name for name in classes})


def _imagenet(root: Path, train: bool) -> FileSource:
    layout = f"the layout is {root}/train/<wnid>/*.JPEG and {root}/val/<wnid>/*.JPEG"
    wnids = {split: _subfolders(root / split) for split in ("train", "val") if (root / split).is_dir()}
    split = "train" if train else "val"
    if split not in wnids:
        raise InputError(f"--root {root}: no folder {split}/ there; {layout}")
    if not wnids[split]:
        raise InputError(f"{root / split}: no class folders there; {layout}")
    # An evaluation machine may hold val/ alone; where both are there, they must number the classes alike.
    if len(wnids) == 2 and wnids["train"] != wnids["val"]:
        odd = sorted(set(wnids["train"]) ^ set(wnids["val"]))
        raise InputError(f"--root {root}: train/ and val/ hold different classes ({len(odd)}, e.g. {odd[0]}); {layout}")
    return _file_source({wnid: root / split / wnid for wnid in wnids[split]})


def _tiny_imagenet(root: Path, train: bool) -> FileSource:
    # Sorted as torchvision's ImageFolder numbers them, since published weights do; wnids.txt is not sorted.
    wnids = sorted(line for line in _lines(root / "wnids.txt") if line)
    if not wnids:
        raise InputError(f"{root / 'wnids.txt'}: names no class: get it anew")
    words = {}
    if (root / "words.txt").is_file():
        words = dict(line.split("\t", 1) for line in _lines(root / "words.txt") if "\t" in line)
    classes = [words.get(wnid, wnid) for wnid in wnids]
    if train:
        folders = {wnid: root / "train" / wnid / "images" for wnid in wnids}
        source = _file_source(folders)
        return FileSource(source.paths, source.labels, classes)
    number = {wnid: label for label, wnid in enumerate(wnids)}
    annotations = root / "val" / "val_annotations.txt"
    paths, labels = [], []
    for line in _lines(annotations):
        if not line:
            continue
        name, wnid = [*line.split("\t"), ""][:2]
        if wnid not in number:
            raise InputError(f"{annotations}: no class of wnids.txt in the line {line!r}: get it anew")
        paths.append(str(root / "val" / "images" / name))
        labels.append(number[wnid])
    if len(set(labels)) < len(wnids):
        empty = next(wnid for wnid in wnids if number[wnid] not in set(labels))
        raise InputError(f"{annotations}: no image of class {empty}: get it anew")
    return FileSource(paths, np.array(labels, np.int64), classes)


def _file_source(folders: dict[str, Path]) -> FileSource:
    """All images below one folder a class; the classes are numbered in the order given."""
    paths: list[str] = []
    labels: list[int] = []
    for label, folder in enumerate(folders.values()):
        images = _images_below(folder)
        if not images:
            raise InputError(
                f"{folder}: a class without images ({', '.join(IMAGE_SUFFIXES)}): add some, or remove the folder"
            )
        paths += images
        labels += [label] * len(images)
    return FileSource(paths, np.array(labels, np.int64), list(folders))


def _images_below(folder: Path) -> list[str]:
    def refuse(error: OSError) -> NoReturn:  # os.walk would skip the folder in silence
        raise InputError(f"{error.filename}: {error.strerror}: the layout needs this folder, readable")

    images = []
    for here, subfolders, files in os.walk(folder, onerror=refuse, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        # Hidden files are no images: macOS leaves a "._photo.jpg" beside every photo.jpg.
        wanted = [name for name in files if name.lower().endswith(IMAGE_SUFFIXES) and name[0] != "."]
        images += [os.path.join(here, name) for name in sorted(wanted)]
    return images


def _subfolders(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != ".")
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}: make it readable") from error


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise InputError(f"{path}: {reason}: it is part of Tiny-ImageNet's official layout") from error


_DOWNLOADED = ("fashion_mnist", "stacked_fashion_mnist", "cifar10", "cifar100")
_LOADERS: dict[str, Callable[..., Source]] = {
    "fashion_mnist": _fashion_mnist,
    "stacked_fashion_mnist": _stacked_fashion_mnist,
    "cifar10": partial(_cifar, "cifar10"),
    "cifar100": partial(_cifar, "cifar100"),
    "tiny_imagenet": _tiny_imagenet,
    "imagenet": _imagenet,
    "imagefolder": _imagefolder,
}
