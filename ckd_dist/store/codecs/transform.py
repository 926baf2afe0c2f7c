"""The codec `transform`: all logits for every temperature, in a few bytes, by a basis that is fitted to a checkpoint.

A teacher's logits are correlated between classes, so a few of their principal axes hold nearly all of what they say. A
record is, byte by byte:

    1              gain: how far the record is from the mean of all, of 256 logarithmic steps
    groups         product quantisation: each byte is one of 256 points of a group of principal axes
    2 * repairs    logits put right where that tells most: 10 bits class and 6 bits error (uint16, little-endian)
    3 * repairs    of more than 1024 classes: 16 bits class and 8 bits error

Axes are shared out among groups by reverse water-filling: a group has as many as that gives eight bits together, one or
two at the front and sixteen at the end. Points are those of k-means of records divided by their gain.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch

from ckd_dist.core.errors import require
from ckd_dist.store.codecs.full import FullCodec
from ckd_dist.store.options import CodecConfig

STEP = 0.2
"""Of a repair, in units of a logit: six bits reach 6.2, eight bits 25.4."""
GAIN_LOW, GAIN_HIGH = 0.05, 20.0
ROUNDS = 15
"""Of k-means."""
SAMPLE = 10_000
"""Records that a basis is fitted to, where there are as many."""


@dataclass(frozen=True)
class Transform(FullCodec):
    """All logits by gain, groups of axes and repairs: for every loss. Encoding and decoding want a `fitted` one."""

    name: ClassVar[str] = "transform"
    is_fitted: ClassVar[bool] = True

    bytes: int = 54
    repairs: int = 4

    @classmethod
    def from_options(cls, config: CodecConfig, num_classes: int) -> Transform:
        """See `Codec`; raises `UserError` for more than 65536 classes."""
        require(num_classes <= 1 << 16, f"codec transform names classes by 16 bits, and there are {num_classes}")
        return cls.of_size(num_classes, config.bytes or 54)

    @classmethod
    def of_size(cls, num_classes: int, size: int) -> Transform:
        """Of so many bytes a record, with as many repairs as serve low temperatures without harm to high ones."""
        return cls(num_classes, size, min(4 if size >= 28 else 2 if size >= 12 else 0, num_classes))

    @classmethod
    def suited_to(cls, num_classes: int, temperature: float) -> Transform:
        """See `Codec`; the temperature does not matter."""
        return cls(num_classes, 2, 0)

    @property
    def repair_bytes(self) -> int:
        """Of a repair."""
        return 2 if self.num_classes <= 1024 else 3

    @property
    def class_bits(self) -> int:
        """Of a repair, those that name the class; the others tell the error."""
        return 10 if self.repair_bytes == 2 else 16

    @property
    def most_steps(self) -> int:
        """That a repair adds or takes away."""
        return 2 ** (8 * self.repair_bytes - self.class_bits - 1) - 1

    @property
    def groups(self) -> int:
        """Bytes of a record that name points."""
        return self.bytes - 1 - self.repair_bytes * self.repairs

    def array(self, count: int) -> tuple[np.dtype, tuple[int, ...]]:
        """(type, shape) of a shard of `count` records."""
        return np.dtype("u1"), (count, self.bytes)

    def fitted(self, basis: Basis) -> Transform:
        """With the basis of a checkpoint, whose records it encodes and decodes."""
        return FittedTransform(self.num_classes, self.bytes, self.repairs, basis=basis)

    def encode(self, logits: torch.Tensor, labels: torch.Tensor, draws: torch.Tensor | None = None) -> torch.Tensor:
        """See `Codec`."""
        raise NotImplementedError("a basis is needed: see `fitted`")

    def decode(
        self, records: torch.Tensor, temperature: float | torch.Tensor, student: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `Codec`."""
        raise NotImplementedError("a basis is needed: see `fitted`")

    def deviation(self, records: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """See `Codec`: by how much more the records miss the logits than the best record of these does, [n], as a share
        of the logits' deviation from their mean. A tie between two points is none."""
        truth = centred(rounded(logits))
        best = self.decode(self.encode(logits, logits.argmax(dim=1)), 1.0).double()
        found = self.decode(records, 1.0).double()
        off = (found - truth).norm(dim=1) - (best - truth).norm(dim=1)
        return (off.clamp(min=0) / truth.norm(dim=1)).float()


def rounded(logits: torch.Tensor) -> torch.Tensor:
    """As a dense store keeps them: so a store that is converted from one holds the bytes of one that was cached."""
    return logits.half().float()


def centred(logits: torch.Tensor) -> torch.Tensor:
    """In float64 and with mean 0: a softmax does not see a shift."""
    logits = logits.double()
    return logits - logits.mean(dim=1, keepdim=True)


# ------------------------------------------------------------------------------------------- the basis


@dataclass(frozen=True, eq=False)
class Basis:
    """What is fitted to a checkpoint's logits, on one device."""

    centre: torch.Tensor
    """The mean of centred logits, float32 [classes]."""
    axes: torch.Tensor
    """Orthonormal rows, float32 [axes, classes]."""
    deviations: torch.Tensor
    """Of the coefficients, which a gain is measured by, float32 [axes]."""
    edges: torch.Tensor
    """Group g has the axes edges[g] to edges[g + 1] - 1: int64 [groups + 1], on the CPU."""
    points: torch.Tensor
    """float32 [groups, 256, most axes of a group], of values that float16 holds; zeros where a group has fewer axes."""

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """First and last + 1 axis of each group."""
        return list(pairwise(self.edges.tolist()))

    @cached_property
    def columns(self) -> torch.Tensor:
        """Which values of a row of `points`, all groups side by side, are of an axis: int64 [axes]."""
        width = self.points.shape[2]
        return torch.cat([torch.arange(b - a) + g * width for g, (a, b) in enumerate(self.spans)]).to(
            self.points.device
        )

    @cached_property
    def offsets(self) -> torch.Tensor:
        """Row of `points`, all groups one below the other, where each group begins: int64 [groups]."""
        return 256 * torch.arange(len(self.points), device=self.points.device)

    @cached_property
    def gains(self) -> torch.Tensor:
        """`_gains` on the device."""
        return _gains(self.points.device)

    def on(self, device: torch.device) -> Basis:
        """On a device, moved there once."""
        if device == self.centre.device:
            return self
        if device not in self._elsewhere:
            centre, axes, deviations = (each.to(device) for each in (self.centre, self.axes, self.deviations))
            self._elsewhere[device] = Basis(centre, axes, deviations, self.edges, self.points.to(device))
        return self._elsewhere[device]

    @cached_property
    def _elsewhere(self) -> dict[torch.device, Basis]:
        return {}

    def content(self) -> bytes:
        """As the bytes of a file that `numpy.load` opens."""
        file = io.BytesIO()
        arrays = {name: getattr(self, name).cpu().numpy() for name in ("centre", "axes", "deviations", "edges")}
        np.savez(file, points=self.points.cpu().half().numpy(), **arrays)
        return file.getvalue()

    @classmethod
    def from_content(cls, content: bytes, codec: Transform) -> Basis:
        """Inverse of `content`; raises `ValueError` where it is none for the `codec`."""
        kinds = {"centre": "<f4", "axes": "<f4", "deviations": "<f4", "edges": "<i8", "points": "<f2"}
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as file:
                arrays = {name: file[name] for name in kinds}
        except Exception as error:  # numpy and zipfile raise many kinds for a damaged one
            raise ValueError(f"it is no basis ({error})") from None
        axes, classes, groups = len(arrays["deviations"]), codec.num_classes, codec.groups
        edges, width = arrays["edges"], arrays["points"].shape[-1]
        shapes = {"centre": (classes,), "axes": (axes, classes), "deviations": (axes,), "edges": (groups + 1,)}
        shapes["points"] = (groups, 256, width)
        for name, kind in kinds.items():
            array = arrays[name]
            if array.dtype.str != kind or array.shape != shapes[name]:
                raise ValueError(f"its {name} are {array.dtype.str} {array.shape}, not {kind} {shapes[name]}")
            if not np.isfinite(array).all():
                raise ValueError(f"its {name} are not finite")
        if edges[0] != 0 or edges[-1] != axes or not (np.diff(edges) >= 0).all() or np.diff(edges).max() > width:
            raise ValueError("its edges are not of its axes")
        tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
        return cls(**{**tensors, "points": tensors["points"].float()})


def fit(codec: Transform, logits: torch.Tensor, seed: int) -> Basis:
    """The basis for records like those of `logits`, float32 [n, classes]; in float64. The same for the same logits on
    one machine; on another its points may be others, and all encode with those of the file."""
    sample = centred(rounded(logits))
    centre = sample.mean(dim=0)
    variances, vectors = torch.linalg.eigh((sample - centre).T @ (sample - centre) / len(sample))
    variances, axes = variances.flip(0).clamp(min=1e-12), vectors.flip(1).T
    axes = axes * axes.gather(1, axes.abs().argmax(dim=1, keepdim=True)).sign()  # that of an eigenvector is arbitrary
    edges = _share_out(variances, codec.groups)
    used = int(edges[-1])
    coefficients = (sample - centre) @ axes[:used].T
    deviations = coefficients.std(dim=0).clamp(min=1e-6)
    coefficients = coefficients / _gains(logits.device)[_gain_code(coefficients, deviations)][:, None].double()
    width = int(edges.diff().max())
    points = torch.zeros(codec.groups, 256, width, dtype=torch.float64, device=logits.device)
    generator = torch.Generator().manual_seed(seed)
    for g, (a, b) in enumerate(pairwise(edges.tolist())):
        if b > a:
            points[g, :, : b - a] = _cluster(coefficients[:, a:b].contiguous(), generator)
    # Rounded as in the file, so that whoever encodes has what the file holds.
    return Basis(centre.float(), axes[:used].float().contiguous(), deviations.float(), edges, points.half().float())


def _share_out(variances: torch.Tensor, groups: int) -> torch.Tensor:
    """Edges of the groups, int64 [groups + 1]: reverse water-filling gives half a bit for each halving of the variance
    above a level, eight bits a group in all; an axis is of the group in which the middle of its bits falls."""
    low, high = 1e-12, variances[0].item()
    bits = torch.zeros_like(variances)
    for _ in range(100):
        level = math.sqrt(low * high)
        bits = (0.5 * torch.log2(variances / level)).clamp(min=0)
        low, high = (level, high) if bits.sum() > 8 * groups else (low, level)
    used = max(1, int((bits > 0).sum()))
    group = ((bits[:used].cumsum(0) - bits[:used] / 2) / 8).long().clamp(max=groups - 1)
    return torch.searchsorted(group.cpu(), torch.arange(groups + 1))


def _cluster(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """256 points of k-means of x, float64 [n, d]: [256, d]; a point that nobody is near begins again at some row."""
    order = torch.randperm(len(x), generator=generator)[:256].to(x.device)
    points = x[order].clone()
    if len(points) < 256:
        points = torch.cat([points, points.new_zeros(256 - len(points), x.shape[1])])
    for _ in range(ROUNDS):
        nearest = _nearest(x, points)
        count = torch.bincount(nearest, minlength=256)[:, None]
        mean = torch.zeros_like(points).index_add_(0, nearest, x) / count.clamp(min=1)
        points = torch.where(count > 0, mean, x[torch.randint(len(x), (256,), generator=generator).to(x.device)])
    return points


def _nearest(x: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Of each row, the number of the nearest point, the first of equals: int64 [n]."""
    return (points.pow(2).sum(dim=1) - 2 * x @ points.T).argmin(dim=1)


def _gain_code(coefficients: torch.Tensor, deviations: torch.Tensor) -> torch.Tensor:
    """The root mean square of coefficients over their deviations, rounded to one of `_gains`: int64 [n]."""
    size = (coefficients / deviations).pow(2).mean(dim=1).sqrt().clamp(GAIN_LOW, GAIN_HIGH)
    return ((size / GAIN_LOW).log() / math.log(GAIN_HIGH / GAIN_LOW) * 255).round().long()


def _gains(device: torch.device) -> torch.Tensor:
    """What each code of a gain stands for, float32 [256]."""
    steps = torch.arange(256, dtype=torch.float64) / 255
    return (GAIN_LOW * (GAIN_HIGH / GAIN_LOW) ** steps).float().to(device)


# ------------------------------------------------------------------------------------------- records


@dataclass(frozen=True)
class FittedTransform(Transform):
    """With the basis of a checkpoint."""

    basis: Basis = field(kw_only=True, compare=False)

    def to_dict(self) -> dict:
        """See `Codec`; the basis has a file of its own."""
        return Transform(self.num_classes, self.bytes, self.repairs).to_dict()

    def encode(self, logits: torch.Tensor, labels: torch.Tensor, draws: torch.Tensor | None = None) -> torch.Tensor:
        """Logits float32 [n, classes] -> records uint8 [n, bytes]; labels and draws do not matter.

        All is chosen in float64: what another shape of batch, or another machine, would round otherwise is a tie in
        1e12.
        """
        basis = self.basis.on(logits.device)
        logits = centred(rounded(logits))
        coefficients = (logits - basis.centre) @ basis.axes.double().T
        gain = _gain_code(coefficients, basis.deviations.double())
        coefficients = coefficients / basis.gains[gain][:, None].double()
        chosen = [
            _nearest(coefficients[:, a:b], basis.points[g, :, : b - a].double()) for g, (a, b) in enumerate(basis.spans)
        ]
        record = torch.stack([gain, *chosen], dim=1).to(torch.uint8)
        if not self.repairs:
            return record
        error = logits - self._transformed(record, torch.float64)
        # Where the divergence loses most: the largest logits, unless the points have these right.
        where = (logits.softmax(dim=1) * error.abs()).argsort(dim=1, descending=True, stable=True)[:, : self.repairs]
        most = self.most_steps
        steps = (error.gather(1, where) / STEP).round().clamp(-most, most).long() + most + 1
        packed = where | steps << self.class_bits
        parts = [packed >> 8 * each & 255 for each in range(self.repair_bytes)]
        return torch.cat([record, torch.stack(parts, dim=2).flatten(1).to(torch.uint8)], dim=1)

    def decode(
        self, records: torch.Tensor, temperature: float | torch.Tensor, student: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Records uint8 [n, bytes] -> logits float32 [n, classes], of mean near 0, whatever the temperature and the
        student."""
        logits = self._transformed(records, torch.float32)
        if self.repairs:
            parts = records[:, 1 + self.groups :].long().unflatten(1, (self.repairs, self.repair_bytes)).unbind(dim=2)
            packed = sum(part << 8 * each for each, part in enumerate(parts))
            assert isinstance(packed, torch.Tensor)
            steps = (packed >> self.class_bits) - self.most_steps - 1
            logits.scatter_add_(1, packed & (1 << self.class_bits) - 1, steps * STEP)
        return logits

    def _transformed(self, records: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What gain and groups say, [n, classes]."""
        basis = self.basis.on(records.device)
        rows = records[:, 1 : self.groups + 1].long() + basis.offsets
        coefficients = basis.points.flatten(0, 1)[rows].flatten(1)[:, basis.columns]
        gain = basis.gains[records[:, 0].long()]
        centre, axes = basis.centre.to(dtype), basis.axes.to(dtype)
        return torch.addmm(centre, (coefficients * gain[:, None]).to(dtype), axes)
