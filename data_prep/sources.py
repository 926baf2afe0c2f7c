"""Datasets as sources of images: `source.read(i, check)` is (uint8 RGB array [height, width, 3], class index)."""

import gzip
import hashlib
import itertools
import os
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
STACK_SEED = 20221130
MAX_PIXELS = 178_956_970  # twice PIL's MAX_IMAGE_PIXELS, where it refuses by itself
NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PCD", "WMF"}
"""What PIL registers a reader for, but cannot decode, or only by running a program; most .pcd are clouds of points."""
SYSTEM_FOLDERS = {
    "#recycle",
    "#snapshot",
    "$recycle.bin",
    "@eadir",
    "@recently-snapshot",
    "@recycle",
    "@tmp",
    "__macosx",
    "lost+found",
    "network trash folder",
    "system volume information",
    "temporary items",
    "~snapshot",
}
"""Where file servers and systems keep thumbnails, metadata and what was deleted; names in lower case."""

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


@dataclass(frozen=True)
class FileSource:
    """Image files of any size.

    Attributes:
        root: the folder that they lie in.
        paths: N files, each of them `root` and what follows.
        labels: int64 [N].
        classes: name of each class.
        left_out: how many files and folders of each kind lie between them and are not among them.
        decoding: how they become pixels.
    """

    root: Path
    paths: list[str]
    labels: NDArray[np.int64]
    classes: list[str]
    left_out: Counter[str]
    decoding: Decoding = Decoding()

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int, check: Check) -> tuple[NDArray[np.uint8], int]:
        """An image and its label. PIL's own limit of pixels must be off.

        Raises what PIL raises (OSError, ValueError, SyntaxError, ...) for a file that it cannot read, `InputError`,
        without the file's name, for one that needs another option, and whatever `check` raises.
        """
        with Image.open(self.paths[index]) as image:
            return decode(image, self.decoding, check), int(self.labels[index])

    def name(self, index: int) -> str:
        return self.paths[index]

    def identity(self) -> Iterator[bytes]:
        """What tells this source from others, in pieces: each image's class and its path below the root."""
        start = len(str(self.root / "x")) - 1  # of a root "." nothing stands in the paths
        for path, label in zip(self.paths, self.labels.tolist(), strict=True):
            yield self.classes[label].encode() + b"\0" + os.fsencode(path[start:]) + b"\0"

    @property
    def max_side(self) -> int | None:
        """The longest side of any image, in pixels; None where only reading every file could tell."""
        return None


Source = ArraySource | FileSource


def source_hash(dataset: str, source: Source) -> str:
    """What every part of a source shares, at whatever root folder it lies: "sha256:" and 64 hexadecimal digits.

    Of image files the names count, not what is in them, which would have to be read.
    """
    digest = hashlib.sha256(dataset.encode() + b"\0")
    for piece in source.identity():
        digest.update(piece)
    return f"sha256:{digest.hexdigest()}"


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


def load_source(dataset: str, root: Path | None, train: bool, decoding: Decoding | None = None) -> Source:
    """The training or test images of a dataset, in an order that depends on the files' names only.

    Args:
        dataset: a key of `NORMALIZATION`.
        root: folder of the dataset; None for (stacked) Fashion-MNIST from Debian's package.
        train: the training images, or the test images (official validation set of ImageNet and
            Tiny-ImageNet). For imagefolder both are the whole tree.
        decoding: how image files become pixels.

    Raises:
        InputError: a missing folder, a wrong layout, an empty class, a damaged archive, a failed download.
    """
    if root is None and not dataset.endswith("fashion_mnist"):
        raise InputError(f"--root: {dataset} needs a folder to read from, e.g. --root data/{dataset}")
    if root is not None and not root.is_dir():
        hint = "; the dataset is downloaded into it" if dataset in _DOWNLOADED else ""
        raise InputError(f"--root {root}: no such folder: correct it, or make it (mkdir -p {root}){hint}")
    source = _LOADERS[dataset](root, train)
    return replace(source, decoding=decoding) if decoding and isinstance(source, FileSource) else source


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
    if images.ndim != 3:
        raise InputError(f"{files[0]}: {images.shape} values are no grey images: get it anew")
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
    left_out: Counter[str] = Counter()
    classes = _subfolders(root, left_out)
    if not classes:
        raise InputError(f"--root {root}: no class folders there; the layout is {root}/<class>/**/*.jpg")
    splits = {"train", "val", "valid", "validation", "test"}
    if set(classes) <= splits:
        raise InputError(
            f"--root {root}: its folders are splits, not classes ({', '.join(classes)}): "
            f"name one of them, e.g. --root {root / classes[0]}"
        )
    return _class_folders(root, {name: root / name for name in classes}, left_out)


def _imagenet(root: Path, train: bool) -> FileSource:
    layout = f"the layout is {root}/train/<wnid>/*.JPEG and {root}/val/<wnid>/*.JPEG"
    left_out: dict[str, Counter[str]] = {"train": Counter(), "val": Counter()}
    wnids = {name: _subfolders(root / name, left_out[name]) for name in left_out if (root / name).is_dir()}
    split = "train" if train else "val"
    if split not in wnids:
        raise InputError(f"--root {root}: no folder {split}/ there; {layout}")
    if not wnids[split]:
        raise InputError(f"{root / split}: no class folders there; {layout}")
    # An evaluation machine may hold val/ alone; where both are there, they must number the classes alike.
    if len(wnids) == 2 and wnids["train"] != wnids["val"]:
        odd = sorted(set(wnids["train"]) ^ set(wnids["val"]))
        raise InputError(f"--root {root}: train/ and val/ hold different classes ({len(odd)}, e.g. {odd[0]}); {layout}")
    return _class_folders(root, {wnid: root / split / wnid for wnid in wnids[split]}, left_out[split])


def _tiny_imagenet(root: Path, train: bool) -> FileSource:
    # Sorted as torchvision's ImageFolder numbers them, since published weights do; wnids.txt is not sorted.
    wnids = sorted((line for line in _lines(root / "wnids.txt") if line), key=os.fsencode)
    if not wnids:
        raise InputError(f"{root / 'wnids.txt'}: names no class: get it anew")
    words = {}
    if (root / "words.txt").is_file():
        words = dict(line.split("\t", 1) for line in _lines(root / "words.txt") if "\t" in line)
    classes = [_text(words.get(wnid, wnid)) for wnid in wnids]
    if train:
        source = _class_folders(root, {wnid: root / "train" / wnid / "images" for wnid in wnids}, Counter())
        return replace(source, classes=classes)
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
    return _each_file_once(root, paths, labels, classes, Counter())


def _class_folders(root: Path, folders: dict[str, Path], left_out: Counter[str]) -> FileSource:
    """All images below one folder a class; the classes are numbered in the order given. Counts in `left_out` too."""
    paths: list[str] = []
    labels: list[int] = []
    seen: dict[str, Path] = {}
    for label, folder in enumerate(folders.values()):
        here: Counter[str] = Counter()
        images = _images_below(folder, seen, here)
        if not images:
            found = f" ({kinds(here)})" if kinds(here) else ""
            raise InputError(f"{folder}: a class without images{found}: add some, or remove the folder")
        paths += images
        labels += [label] * len(images)
        left_out.update(here)
    return _each_file_once(root, paths, labels, list(map(_text, folders)), left_out)


def _each_file_once(
    root: Path, paths: list[str], labels: list[int], classes: list[str], left_out: Counter[str]
) -> FileSource:
    """The files under their first name each, whatever links lead to them. Counts in `left_out` too."""
    first: dict[tuple[int, int], int] = {}
    kept = []
    for number, path in enumerate(paths):
        try:
            status = os.stat(path)
            before = first.setdefault((status.st_dev, status.st_ino), number)
        except OSError:  # whoever reads it says so
            before = number
        if before == number:
            kept.append(number)
        elif labels[before] == labels[number]:
            left_out["files linked twice"] += 1
        else:
            raise InputError(f"{path}: the same file as {paths[before]}, of another class: remove one of them")
    return FileSource(root, [paths[i] for i in kept], np.array(labels, np.int64)[kept], classes, left_out)


def _images_below(folder: Path, seen: dict[str, Path], left_out: Counter[str]) -> list[str]:
    """The images of a class, from each real folder once, whatever links lead to it. `seen`: the class folder of each
    real folder of this class and of those before it."""

    def refuse(error: OSError) -> NoReturn:  # os.walk would skip the folder in silence
        raise InputError(f"{error.filename}: {error.strerror}: the layout needs this folder, readable")

    parent = os.path.realpath(folder.parent)
    above = {parent, *map(str, Path(parent).parents), *map(str, Path(os.path.realpath(folder)).parents)}
    images = []
    for here, subfolders, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(here)
        if real in above or seen.get(real) == folder:
            left_out["folders linked in a loop or twice"] += 1
            subfolders.clear()
            continue
        if seen.setdefault(real, folder) != folder:
            raise InputError(f"{here}: the same folder is below {seen[real]}, another class: remove the link")
        subfolders[:] = _wanted(subfolders, left_out)
        for name in sorted(files, key=os.fsencode):
            path = os.path.join(here, name)
            # Hidden files are no images: macOS leaves a "._photo.jpg" beside every photo.jpg.
            if name.startswith("."):
                left_out["hidden"] += 1
            elif _is_image(path):
                images.append(path)
            else:
                left_out[os.path.splitext(name)[1].lower() or "without suffix"] += 1
    return images


def _is_image(path: str) -> bool:
    """Whether PIL reads files of this suffix or, where there is none, this file by its first bytes."""
    suffix = os.path.splitext(path)[1].lower()
    suffixes, formats = _readable()
    if suffix or not os.path.isfile(path):
        return suffix in suffixes
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's, about a file that is just looked at
            with Image.open(path, formats=formats):
                return True
    except Image.DecompressionBombError:
        return True
    except Exception:  # as many kinds as PIL has formats
        return False


@cache
def _readable() -> tuple[frozenset[str], list[str]]:
    """The suffixes of pictures that PIL can decode on this machine, and the formats that it tells by first bytes."""
    Image.init()
    formats = {name: accept for name, (_, accept) in Image.OPEN.items() if name not in NO_PICTURES}
    suffixes = frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)
    return suffixes, [name for name, accept in formats.items() if accept]


def kinds(left_out: Counter[str], most: int = 8) -> str:
    """What was left out, e.g. "60 .txt, 2 hidden": the `most` frequent kinds, and the others in one."""
    named = (+left_out).most_common(most)
    others = left_out.total() - sum(count for _, count in named)
    return ", ".join([f"{count:,} {kind}" for kind, count in named] + [f"{others:,} of other kinds"] * bool(others))


def _subfolders(folder: Path, left_out: Counter[str]) -> list[str]:
    """Names of class folders; other folders, and images beside them, are counted in `left_out`."""
    names = []
    try:
        for entry in folder.iterdir():
            if entry.is_dir():
                names.append(entry.name)
            elif not entry.name.startswith(".") and _is_image(str(entry)):
                left_out["images beside the class folders"] += 1
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}: make it readable") from error
    return _wanted(names, left_out)


def _wanted(folders: list[str], left_out: Counter[str]) -> list[str]:
    """The names of folders that may hold images, sorted; the others are counted in `left_out`."""
    wanted = []
    for name in sorted(folders, key=os.fsencode):
        if name.startswith("."):
            left_out["hidden"] += 1
        elif name.lower() in SYSTEM_FOLDERS:
            left_out["system folders"] += 1
        else:
            wanted.append(name)
    return wanted


def _lines(path: Path) -> list[str]:
    """Lines of a UTF-8 file, as names of files whatever the locale."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise InputError(f"{path}: {reason}: it is part of Tiny-ImageNet's official layout") from error
    return [os.fsdecode(line.strip().encode()) for line in text.splitlines()]


def _text(name: str) -> str:
    """A file's name, which Python read by the locale's encoding, as the text that it is in UTF-8."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


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
