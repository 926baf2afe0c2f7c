"""A store, or some checkpoints and views of it, as one file to share: an uncompressed tar with a card, README.md."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from ckd_dist.core import checkpoint as checkpoints
from ckd_dist.core.console import ProgressDisplay
from ckd_dist.core.errors import UserError, require
from ckd_dist.core.files import write_atomically
from ckd_dist.store.check import faults
from ckd_dist.store.manifest import Manifest, basis_path
from ckd_dist.store.size import format_bytes

CARD, MANIFEST = "README.md", "manifest.json"


def pack(store: Path, out: Path, names: list[int | str], views: int | None, licence: str) -> None:
    """Write checkpoints `names` (default: all) and their first `views` (default: all) of a store into the file `out`,
    atomically; the same bytes for the same records, whatever the machine. Paths of this machine are left out.

    Raises `UserError` for a checkpoint or views that the store lacks, and for a damaged shard.
    """
    manifest = _chosen(Manifest.load(store, "STORE"), names, views)
    require(not out.exists(), f"FILE: {out} is there already: remove it, or name a new file")
    require(out.parent.is_dir(), f"FILE: no such folder: {out.parent}")
    bad = faults(store, manifest)
    require(not bad, f"STORE: {bad and bad[0][1]}: run python -m ckd_dist.store repair")
    files = list(_files(manifest))
    with ProgressDisplay(len(files), unit="files") as progress:

        def write(file: BinaryIO) -> None:
            with tarfile.open(fileobj=file, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
                for name, content in ((CARD, card(manifest, licence).encode()), (MANIFEST, manifest.content())):
                    tar.addfile(_member(name, len(content)), io.BytesIO(content))
                for done, path in enumerate(files):
                    with open(store / path, "rb") as source:
                        tar.addfile(_member(path, os.fstat(source.fileno()).st_size), source)
                    progress.update(done + 1, f"packing {out.name}")

        write_atomically(out, write)


def unpack(file: Path, store: Path) -> Manifest:
    """Make the folder `store` of a packed file, once all of it has been compared with its checksums.

    Raises `UserError` where the folder is there already, and for a file that is damaged, cut short, or holds anything
    beside what its manifest says: nothing is left then.
    """
    require(file.is_file(), f"FILE: no such file: {file}")
    require(not store.exists(), f"STORE: {store} is there already: name a new folder")
    begun = store.with_name(f".{store.name}.unpacking")
    shutil.rmtree(begun, ignore_errors=True)
    try:
        begun.mkdir(parents=True)
        manifest = _extract(file, begun)
        bad = faults(begun, manifest)
        require(not bad, f"FILE: {file} is damaged ({bad and bad[0][1].removeprefix(f'{begun}/')}): get it anew")
        begun.rename(store)
    finally:
        shutil.rmtree(begun, ignore_errors=True)
    return manifest


def _chosen(manifest: Manifest, names: list[int | str], views: int | None) -> Manifest:
    """The manifest of a part of a store, without paths."""
    members = manifest.members
    chosen = {}
    for each in checkpoints.choose(members, names or list(members), "checkpoints"):
        held = manifest.checkpoints[members[each]]
        wanted = views or held["views"]
        require(wanted <= held["views"], f"views is {wanted}, and checkpoint {each} has {held['views']}: ask for less")
        chosen[members[each]] = {**held, "views": wanted}
    return replace(manifest, checkpoints=dict(sorted(chosen.items())), paths={})


def _files(manifest: Manifest) -> Iterator[str]:
    """Names of the files of a store, beside the manifest, in the order in which they are packed."""
    for name in manifest.checkpoints:
        if manifest.recorded.is_fitted:
            basis = basis_path(Path(), name)
            yield from (str(basis), str(basis.with_suffix(".json")))
        for shard in manifest.checkpoint_shards(name):
            path = shard.path(Path())
            yield from (str(path), str(path.with_suffix(".json")))


def _member(name: str, size: int) -> tarfile.TarInfo:
    """A regular file that anybody may read, of no time and nobody."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info


def _extract(file: Path, folder: Path) -> Manifest:
    """Write the files of an archive: those that its manifest names, each once, in its order, and no other."""
    mend = "get it anew, or pack it with this version"
    try:
        with tarfile.open(file, mode="r|") as tar:
            members = iter(tar)
            for expected in (CARD, MANIFEST):
                _write(tar, next(members, None), expected, folder)
            manifest = Manifest.load(folder, f"FILE: {file}")
            for expected in _files(manifest):
                _write(tar, next(members, None), expected, folder)
            more = next(members, None)
            require(
                more is None, f"FILE: {file} holds {more and ascii(more.name)}, which its manifest does not: {mend}"
            )
    except (tarfile.TarError, EOFError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"FILE: {file} is no whole packed store ({error}): {mend}") from None
    return manifest


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo | None, expected: str, folder: Path) -> None:
    """Write the next member; raises `ValueError` where it is not the regular file `expected`."""
    if member is None or member.name != expected or not member.isreg():
        raise ValueError(f"{expected} is missing")
    source = tar.extractfile(member)
    assert source is not None
    path = folder / expected
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "xb") as target:
        shutil.copyfileobj(source, target)


def card(manifest: Manifest, licence: str) -> str:
    """What somebody who gets the file needs to know, as Markdown."""
    forward, size = manifest.forward, manifest.recorded.record_bytes
    count = sum(shard.count for shard in manifest.all_shards())
    rows = [
        f"| {name} | {values['model']} | {values['views']} | {values['weights_sha256'][:16]} |"
        for name, values in manifest.checkpoints.items()
    ]
    return _CARD.format(
        licence=licence,
        **manifest.dataset,
        classes=", ".join([*manifest.classes[:5], *["..."][: len(manifest.classes) - 5]]) or "unnamed",
        views=f"{manifest.recipe['kind']}, seed {manifest.view_seed}",
        image_size=forward["image_size"],
        mean=" ".join(f"{value:.4g}" for value in forward["mean"]),
        std=" ".join(f"{value:.4g}" for value in forward["std"]),
        amp=forward["amp"],
        codec=", ".join(f"{value}" if key == "name" else f"{key} {value}" for key, value in manifest.codec.items()),
        size=f"{count:,} records of {size} bytes, {format_bytes(count * size)}",
        checkpoints="\n".join(rows),
        first=next(iter(manifest.members)),
    )


_CARD = """# A teacher's logits on {name}

What a trained classifier answers to augmented views of its training images, to train students from without the
classifier itself: a packed store of `ckd_dist`.

- **Licence**: {licence}
- **Images**: {name}, {count:,} images of {num_classes} classes ({classes})
- **Their hash**: {content_hash}, of the .beton file that they are in
- **Views**: {views}; at {image_size} px, normalised by mean {mean} and deviation {std}
- **Codec**: {codec}; {size}
- **Precision of the forward pass**: {amp}

| checkpoint | network | views | weights, sha256 |
|---|---|---|---|
{checkpoints}

## Use

With the same images in a .beton file, train.beton:

```
python -m ckd_dist.store unpack THIS_FILE stores/teacher
python -m ckd_dist.store verify stores/teacher --data.train train.beton   # are these the images?
python -m ckd_dist.distill --data.train train.beton --model.name resnet18 \\
    --teacher.store stores/teacher --teacher.checkpoints [{first}] --run_dir runs/student
```

Or in a training loop of your own, without FFCV: `ckd_dist.open_store("stores/teacher")`. Shards are `.npy` files, each
with its checksum beside it.
"""
