"""The images of a .beton file, without FFCV."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ckd_dist.core.errors import UserError, require
from ckd_dist.data.dataset import DatasetInfo, read_info

# As FFCV 1.0.2 lays files out (its types.py and fields/rgb_image.py), padding included.
_HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page_size", "<u4"), ("samples", "<u8"), ("table", "<u8")], align=True
)
_FIELD = np.dtype([("type", "u1"), ("name", "u1", 16), ("arguments", "u1", 1024)], align=True)
_IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
_SAMPLE = np.dtype([("image", _IMAGE), ("label", "<i8")], align=True)
_ALLOCATED = np.dtype([("sample", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
_INTEGER, _RGB_IMAGE, _JPEG = 1, 2, 0


class BetonImages:
    """The images of a .beton file of data_prep.write_beton as they are stored, a map-style data set: image i is
    (bytes of a JPEG file or uint8 [height, width, 3], label). It needs no FFCV, and may go to workers of a DataLoader.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Open a file; raises `UserError` where it, or its description, is missing or damaged."""
        self.info: DatasetInfo = read_info(Path(path), "images")
        header = np.fromfile(self.info.path, _HEADER, 1)
        fields = np.fromfile(self.info.path, _FIELD, 2, offset=_HEADER.itemsize)
        good = len(fields) == 2 and header["version"] == 2 and header["samples"] == self.info.count
        require(
            bool(good and fields["type"].tolist() == [_RGB_IMAGE, _INTEGER]),
            f"images: {self.info.path} is not laid out as data_prep.write_beton does: write it anew",
        )
        start = _HEADER.itemsize + 2 * _FIELD.itemsize
        samples = np.fromfile(self.info.path, _SAMPLE, self.info.count, offset=start)
        table = np.sort(np.fromfile(self.info.path, _ALLOCATED, offset=int(header["table"][0])), order="sample")
        whole = len(samples) == self.info.count and np.array_equal(table["ptr"], samples["image"]["data_ptr"])
        require(whole, f"images: {self.info.path} is damaged: write it anew with data_prep.write_beton")
        self.labels: np.ndarray = samples["label"].copy()
        """Class index of every image, int64 [count]."""
        self._fields, self._sizes = samples["image"].copy(), table["size"].copy()

    def __len__(self) -> int:
        return self.info.count

    def __getitem__(self, index: int) -> tuple[bytes | np.ndarray, int]:
        """Raises IndexError beyond the last image, `UserError` where the file ends before it."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        field, size = self._fields[index], int(self._sizes[index])
        data = np.fromfile(self.info.path, np.uint8, size, offset=int(field["data_ptr"]))
        if len(data) < size:
            raise UserError(f"images: {self.info.path} ends within image {index}: write it anew")
        if field["mode"] == _JPEG:
            return data.tobytes(), int(self.labels[index])
        return data.reshape(int(field["height"]), int(field["width"]), 3), int(self.labels[index])
