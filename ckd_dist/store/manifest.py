"""The identity of a store, and where its shards lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ckd_dist.core.errors import UserError, require
from ckd_dist.core.files import parse_json, read_json, write_bytes_atomically
from ckd_dist.core.identity import Input
from ckd_dist.core.options import flatten
from ckd_dist.data.recipe import ViewRecipe
from ckd_dist.store.codecs import factory
from ckd_dist.store.codecs.base import Codec

FORMAT = 5
"""Of manifest.json. Formats 2 to 4 are read too: their shards have checksums by sha256; 2 and 3 tell neither classes
nor paths, and format 2 has one number of views for all checkpoints."""


@dataclass(frozen=True)
class Shard:
    """One file: samples `first` to `last` (both included) of one view, as one checkpoint saw them."""

    checkpoint: str
    view: int
    first: int
    last: int

    @property
    def count(self) -> int:
        """Number of records."""
        return self.last - self.first + 1

    def path(self, store: Path) -> Path:
        """The .npy file; its checksum is in the .json of the same name."""
        return store / self.checkpoint / f"view_{self.view:04d}" / f"samples_{self.first:08d}-{self.last:08d}.npy"


@dataclass(kw_only=True)
class Sidecar:
    """What the .json beside a shard holds: what the shard is of, where it belongs, and its checksum."""

    __pydantic_config__ = {"extra": "forbid"}

    identity: str
    weights_sha256: str
    checkpoint: str
    view: int
    first: int
    last: int
    xxh3_128: str | None = None
    """The checksum, as all shards are given it."""
    sha256: str | None = None
    """The checksum of a shard that an older version wrote."""
    basis_sha256: str | None = None
    """Of the checkpoint's basis, where the codec has one: see `bases`."""


@dataclass(kw_only=True)
class BasisSidecar:
    """What the .json beside a checkpoint's basis holds, where the codec has one: see `bases`."""

    __pydantic_config__ = {"extra": "forbid"}

    identity: str
    weights_sha256: str
    checkpoint: str
    sha256: str


def basis_path(store: Path, checkpoint: str) -> Path:
    """Where the basis of a checkpoint is; its checksum is in the .json of the same name."""
    return store / checkpoint / "basis.npz"


def read_basis_sidecar(store: Path, checkpoint: str) -> BasisSidecar:
    """What stands beside a basis; raises `OSError` and `ValueError` where there is nothing, or it is damaged."""
    return parse_json(basis_path(store, checkpoint).with_suffix(".json").read_bytes(), BasisSidecar)


@dataclass(kw_only=True)
class Manifest:
    """What the logits of a store are of. Equal identities mean interchangeable logits."""

    dataset: dict
    """`name`, `content_hash`, `count` and `num_classes` of the images; `label_map` where labels were mapped to the
    teacher's classes."""
    recipe: dict
    """How views are drawn (`ViewRecipe.to_dict`)."""
    view_seed: int
    forward: dict
    """How the teacher saw the images: `image_size`, `mean`, `std`, `amp`; `columns` of its logits that are kept, where
    that is not all; `transform`, the name of what changed the views, where `ckd_dist.cache` was given any."""
    codec: dict
    """What is kept of the logits (`Codec.to_dict`)."""
    shard_size: int
    """Records in every shard but the last of a view."""
    checkpoints: dict[str, dict]
    """Member name (`member_name`) -> `epoch`, `model`, `weights_sha256`, and `views`, their number: 0 to views - 1."""
    images: dict[str, str]
    """Sample id -> sha256 of a decoded image, for a few (`loader.image_digests`)."""
    classes: list[str] = field(default_factory=list)
    """The teacher's name of each class; empty where an older version left it out."""
    paths: dict[str, str] = field(default_factory=dict)
    """Option -> where its file or folder lay, absolute: for `ckd_dist.lineage`."""

    @property
    def identity(self) -> dict:
        """What must be equal for logits to belong together; checkpoints and views of them may be added later, and where
        images decode differently that is said, not refused."""
        mutable = ("checkpoints", "images", "classes", "paths")
        return {key: value for key, value in asdict(self).items() if key not in mutable}

    @property
    def identity_hash(self) -> str:
        """sha256 of the identity, carried by every shard."""
        return _checksum(self.identity)

    @property
    def recorded(self) -> Codec:
        """The codec of the records."""
        return factory.from_dict(self.codec, self.dataset["num_classes"])

    @property
    def members(self) -> dict[int | str, str]:
        """What users call each checkpoint -> its member name: 40, or RUN/40 for one of a named run; in order of epochs,
        the unnamed run first."""
        named = [(name.rpartition("/")[0], values["epoch"], name) for name, values in self.checkpoints.items()]
        return {f"{run}/{epoch}" if run else epoch: name for run, epoch, name in sorted(named)}

    def members_of(self, run: str | None) -> dict[int | str, str]:
        """The `members` of one run, by its name if it has one; raises `UserError` when there are none."""
        found = {key: name for key, name in self.members.items() if name.rpartition("/")[0] == (run or "")}
        runs = sorted({name.rpartition("/")[0] for name in self.checkpoints} - {""})
        require(bool(found), f"teacher.name: the store holds no such run; named runs are {', '.join(runs) or 'none'}")
        return found

    def views(self, names: Iterable[int | str]) -> int:
        """Number of views that all of these checkpoints, as users call them, have."""
        members = self.members
        return min(self.checkpoints[members[name]]["views"] for name in names)

    def as_input(self, store: str | Path, checkpoints: Iterable[int | str]) -> Input:
        """What a result that is made of these checkpoints' logits, in the folder `store`, depends on."""
        holds = flatten({key: value for key, value in self.identity.items() if key != "shard_size"})
        for name in sorted(checkpoints, key=str):
            holds[f"checkpoint {name}"] = self.checkpoints[self.members[name]]["weights_sha256"]
            if self.recorded.is_fitted:
                holds[f"basis {name}"] = self._basis_sha256(Path(store), self.members[name])
        return Input.of("store", store, holds)

    @staticmethod
    def _basis_sha256(store: Path, member: str) -> str | None:
        try:
            return read_basis_sidecar(store, member).sha256
        except (OSError, ValueError):  # whoever reads its records says so
            return None

    def shards(self, checkpoint: str, view: int) -> list[Shard]:
        """All shards of one view of one checkpoint, in order."""
        count, size = self.dataset["count"], self.shard_size
        return [Shard(checkpoint, view, first, min(first + size, count) - 1) for first in range(0, count, size)]

    def checkpoint_shards(self, checkpoint: str, views: int | None = None) -> list[Shard]:
        """The shards of one checkpoint, view after view: of the first `views`, default: of all."""
        views = views or self.checkpoints[checkpoint]["views"]
        return [shard for view in range(views) for shard in self.shards(checkpoint, view)]

    def all_shards(self) -> list[Shard]:
        """The shards of all checkpoints and views."""
        return [shard for name in self.checkpoints for shard in self.checkpoint_shards(name)]

    def sidecar(self, shard: Shard, basis_sha256: str | None, xxh3_128: str | None = None) -> Sidecar:
        """What stands beside a shard whose file has the checksum `xxh3_128`, and its checkpoint's basis the other."""
        return Sidecar(
            identity=self.identity_hash,
            weights_sha256=self.checkpoints[shard.checkpoint]["weights_sha256"],
            checkpoint=shard.checkpoint,
            view=shard.view,
            first=shard.first,
            last=shard.last,
            xxh3_128=xxh3_128,
            basis_sha256=basis_sha256,
        )

    def require_same(self, other: Manifest, here: str, there: str) -> None:
        """Raise `UserError` naming the first field in which `self` (described as `here`) differs from `other`."""
        mine, theirs = flatten(self.identity), flatten(other.identity)
        for key in {**mine, **theirs}:
            a, b = mine.get(key), theirs.get(key)
            require(a == b, f"{here} has {key} {a}, {there} has {b}: they do not belong together")

    def require_plain_views(self, option: str, store: Path) -> None:
        """Raise `UserError` where a transform changed the views of `store`: FFCV's loader knows none."""
        name = self.forward.get("transform")
        require(
            name is None,
            f"{option}: the teacher of {store} saw views with the transform {name}, which this command does not know: "
            "train with ckd_dist.Views, or cache plain views",
        )

    def decoding_note(self, images: dict[str, str]) -> str | None:
        """A warning where `images`, decoded here, are not those that the teacher saw, else None."""
        differ = [sample for sample, digest in self.images.items() if images.get(sample) != digest]
        if not differ:
            return None
        return (
            f"warning: image {', '.join(differ)} decodes here to other pixels than when the store was written (another "
            "JPEG or resize library): the teacher saw slightly different images"
        )

    def content(self) -> bytes:
        """manifest.json: the fields and a checksum of them."""
        values = {"format": FORMAT, **asdict(self)}
        return (json.dumps({**values, "checksum": _checksum(values)}, indent=2) + "\n").encode()

    def save(self, store: Path) -> None:
        """Write manifest.json, atomically."""
        write_bytes_atomically(store / "manifest.json", self.content())

    @classmethod
    def load(cls, store: Path, option: str) -> Manifest:
        """Read manifest.json; raises `UserError` where it is missing, damaged or of another version."""
        path = store / "manifest.json"
        require(path.exists(), f"{option}: {store} is not a logit store: it has no manifest.json (see cache_logits)")
        values = read_json(path, dict, option, "put back the one that the store was written with")
        found = values.get("format")
        require(found in (2, 3, 4, FORMAT), f"{option}: {path} has format {found}, this version reads 2 to {FORMAT}")
        checksum = values.pop("checksum", None)
        require(checksum == _checksum(values), f"{option}: {path} does not match its checksum: it was changed")
        del values["format"]
        try:
            if found == 2:
                views = values.pop("views")
                values["checkpoints"] = {k: {**v, "views": views} for k, v in values["checkpoints"].items()}
            if found in (2, 3):
                values.update(classes=[], paths={})
            parse_json(json.dumps(values), _Schema)
            manifest = cls(**values)
            shards = manifest.dataset["count"] // manifest.shard_size + 1
            total = shards * sum(checkpoint["views"] for checkpoint in manifest.checkpoints.values())
            require(total < 10**7, f"{option}: {path} is damaged: no store has {total} shards")
            _ = manifest.recorded.record_bytes  # raises for what is no codec
            return manifest
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{option}: {path} is damaged ({error})") from None


def _checksum(values: dict) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def member_name(epoch: int, run: str | None = None) -> str:
    """Name of a checkpoint, and of its folder in a store; `run` names its run in a store of several."""
    return f"{run}/epoch_{epoch:04d}" if run else f"epoch_{epoch:04d}"


# ------------------------------------------------------------------------------------------- schema

_Count = Annotated[int, Field(ge=1, le=2**40)]
_Strict = {"extra": "forbid"}


@dataclass(kw_only=True)
class _Images:
    __pydantic_config__ = _Strict
    name: str
    content_hash: str
    count: _Count
    num_classes: _Count
    label_map: list[int] | None = None


@dataclass(kw_only=True)
class _Forward:
    __pydantic_config__ = _Strict
    image_size: _Count
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    amp: Literal["bfloat16", "float16", "off"]
    columns: list[Annotated[int, Field(ge=0)]] | None = None
    transform: str | None = None


@dataclass(kw_only=True)
class _Checkpoint:
    __pydantic_config__ = _Strict
    epoch: Annotated[int, Field(ge=0)]
    model: str
    weights_sha256: str
    views: _Count


@dataclass(kw_only=True)
class _Schema:
    """What the fields of a `Manifest` hold. It is checked as it is read, and kept as it was read: its identity is that
    of its text."""

    __pydantic_config__ = _Strict
    dataset: _Images
    recipe: ViewRecipe
    view_seed: Annotated[int, Field(ge=0, lt=2**31)]
    forward: _Forward
    codec: dict
    shard_size: _Count
    # The names are folders of the store: none leads out of it.
    checkpoints: dict[Annotated[str, Field(pattern=r"^([A-Za-z][\w-]*/)?epoch_\d{4,}$")], _Checkpoint]
    images: dict[str, str]
    classes: list[str]
    paths: dict[str, str]
