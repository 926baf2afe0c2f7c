"""Look at a logit store, and check it.

  python -m ckd_dist.store info STORE       what it holds, and what is missing
  python -m ckd_dist.store verify STORE     compare every shard with its checksum; exit status 1 names the bad ones

--json prints for machines. Neither command writes anything; cache_logits, started again, computes what is missing, and
what was deleted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import NoReturn

from ckd_dist.config import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (see --help)", file=sys.stderr)
        sys.exit(2)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = _Parser(
        prog="python -m ckd_dist.store", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["info", "verify"])
    parser.add_argument("store", type=Path, metavar="STORE")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    try:
        return {"info": info, "verify": verify}[options.command](options.store, options.json)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def info(store: Path, as_json: bool) -> int:
    """Print the manifest and, for every checkpoint, how much of it is there."""
    from rich.console import Console
    from rich.table import Table

    from ckd_dist.store.manifest import Manifest
    from ckd_dist.store.writer import is_written

    manifest = Manifest.load(store, "STORE")
    members = []
    for name, values in manifest.checkpoints.items():
        shards = manifest.checkpoint_shards(name)
        written = [shard.path(store) for shard in shards if is_written(store, shard)]
        size = sum(path.stat().st_size for path in written)
        members.append({"name": name, **values, "shards": len(shards), "written": len(written), "bytes": size})
    if as_json:
        print(json.dumps({**manifest.identity, "views": manifest.views, "checkpoints": members}, indent=2))
        return 0
    dataset, codec, forward = manifest.dataset, manifest.codec, manifest.forward
    console = Console(highlight=False)
    console.print(
        f"{store}: {dataset['count']:,} images of {dataset['name']} ({dataset['num_classes']} classes), "
        f"{manifest.views} views ({manifest.recipe['kind']}, seed {manifest.view_seed})\n"
        f"logits: {codec['name']} {codec['dtype']}, of {forward['image_size']} px images, forward pass {forward['amp']}"
    )
    table = Table()
    for column in ("checkpoint", "model", "weights sha256", "shards", "bytes"):
        table.add_column(column, justify="right" if column in ("shards", "bytes") else "left")
    for member in members:
        there = f"{member['written']} of {member['shards']}"
        table.add_row(member["name"], member["model"], member["weights_sha256"][:12], there, f"{member['bytes']:,}")
    console.print(table)
    return 0


def verify(store: Path, as_json: bool) -> int:
    """Compare every shard with its checksum and print the bad ones; returns 1 when there are any."""
    from rich.console import Console
    from rich.progress import track

    from ckd_dist.store.check import shard_fault
    from ckd_dist.store.manifest import Manifest

    manifest = Manifest.load(store, "STORE")
    shards = [shard for name in manifest.checkpoints for shard in manifest.checkpoint_shards(name)]
    screen = Console(stderr=True)
    shown = track(shards, "verifying", console=screen, disable=not screen.is_terminal)
    faults = [fault for shard in shown if (fault := shard_fault(store, manifest, shard))]
    if as_json:
        print(json.dumps({"shards": len(shards), "bad": faults}, indent=2))
    else:
        print(*faults, f"{store}: {len(shards) - len(faults)} of {len(shards)} shards are good", sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)
