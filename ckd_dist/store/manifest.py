"""The identity of a store, and where its shards lie."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ckd_dist.checkpoint import write_atomically
from ckd_dist.config import UserError, flatten, require

FORMAT = 1


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
class Manifest:
    """What the logits of a store are of. Equal identities mean interchangeable logits."""

    dataset: dict
    """`name`, `content_hash`, `count` and `num_classes` of the images."""
    recipe: dict
    """How views are drawn (`ViewRecipe.to_dict`)."""
    view_seed: int
    forward: dict
    """How the teacher saw the images: `image_size`, `mean`, `std`, `amp`."""
    codec: dict = field(default_factory=lambda: {"name": "dense", "dtype": "float16"})
    shard_size: int
    """Records in every shard but the last of a view."""
    views: int
    """Number of views: 0 to views - 1."""
    checkpoints: dict[str, dict]
    """Member name -> `epoch`, `model`, `weights_sha256`."""

    @property
    def identity(self) -> dict:
        """What must be equal for logits to belong together; views and checkpoints may be added later."""
        return {key: value for key, value in asdict(self).items() if key not in ("views", "checkpoints")}

    @property
    def identity_hash(self) -> str:
        """sha256 of the identity, carried by every shard."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    def shards(self, checkpoint: str, view: int) -> list[Shard]:
        """All shards of one view of one checkpoint, in order."""
        count, size = self.dataset["count"], self.shard_size
        return [Shard(checkpoint, view, first, min(first + size, count) - 1) for first in range(0, count, size)]

    def checkpoint_shards(self, checkpoint: str) -> list[Shard]:
        """All shards of one checkpoint, view after view."""
        return [shard for view in range(self.views) for shard in self.shards(checkpoint, view)]

    def sidecar(self, shard: Shard) -> dict:
        """What stands beside a shard, but for its checksum: what it is of, and where it belongs."""
        return {
            "identity": self.identity_hash,
            "weights_sha256": self.checkpoints[shard.checkpoint]["weights_sha256"],
            "checkpoint": shard.checkpoint,
            "view": shard.view,
            "first": shard.first,
            "last": shard.last,
        }

    def require_same(self, other: Manifest, here: str, there: str) -> None:
        """Raise `UserError` naming the first field in which `self` (described as `here`) differs from `other`."""
        mine, theirs = flatten(self.identity), flatten(other.identity)
        for key in sorted(mine.keys() | theirs.keys()):
            a, b = mine.get(key), theirs.get(key)
            require(a == b, f"{here} has {key} {a}, {there} has {b}: they do not belong together")

    def save(self, store: Path) -> None:
        """Write manifest.json, atomically."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n"
        write_atomically(store / "manifest.json", lambda file: file.write(text.encode()))

    @classmethod
    def load(cls, store: Path, option: str) -> Manifest:
        """Read manifest.json; raises `UserError` where it is missing, damaged or of another version."""
        path = store / "manifest.json"
        require(path.is_file(), f"{option}: {store} is not a logit store: it has no manifest.json (see cache_logits)")
        try:
            values = json.loads(path.read_text())
            found = values.pop("format")
            require(found == FORMAT, f"{option}: {path} has format {found}, this version reads {FORMAT}")
            return cls(**values)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{option}: {path} is damaged ({error})") from None


def member_name(epoch: int) -> str:
    """Name of a checkpoint's folder in a store."""
    return f"epoch_{epoch:04d}"
