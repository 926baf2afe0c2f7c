"""Plan, look at, check, mend and convert a logit store.

  python -m ckd_dist.store plan OPTIONS      before caching: bytes, files, seconds, and from how many students on it
                                             pays; OPTIONS are those of ckd_dist.cache_logits
  python -m ckd_dist.store info STORE        what a store holds, and what is missing
  python -m ckd_dist.store verify STORE      compare every shard with its checksum; exit status 1 names the bad ones.
                                             With --data.train, see whether these are its images; with
                                             --teacher.run too, compute a random sample of records anew and compare
  python -m ckd_dist.store repair STORE --teacher.run RUN --data.train X.beton
                                             compute anew what is missing or bad, and nothing else
  python -m ckd_dist.store convert STORE NEW --codec topk --k 8 --data.train X.beton
                                             write a dense store once more with another codec, without the teacher

  python -m ckd_dist.store compare STORE     what codecs of other sizes would keep of a dense store, to choose one

  python -m ckd_dist.store pack STORE FILE   checkpoints and views in one file to share, with a card
  python -m ckd_dist.store unpack FILE STORE make a store of such a file

plan, verify, repair and convert also run under torchrun. --json prints for machines.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ckd_dist.core.errors import require
from ckd_dist.core.options import Parser, flag_words, load_config, option_words
from ckd_dist.core.process import run_process
from ckd_dist.data.options import LoaderConfig
from ckd_dist.store.options import CodecConfig, PlanConfig

if TYPE_CHECKING:
    from ckd_dist.store.compare import Comparison

COMMANDS = ("plan", "info", "verify", "repair", "convert", "compare", "pack", "unpack")


def main(words: list[str] | None = None) -> int:
    """Run a command line (default: this process's); returns the exit status."""
    words = option_words(sys.argv[1:] if words is None else words)
    if words[:1] == ["plan"]:
        words = flag_words(words[1:], "json")
        return plan(load_config(PlanConfig, words, prog="python -m ckd_dist.store plan"))
    options = _parse(words)
    if options.command == "info":
        return info(options.store, options.json)
    if options.command == "verify":
        return verify(options)
    run = {"repair": repair, "convert": convert, "compare": compare, "pack": pack, "unpack": unpack}
    return run[options.command](options)


def _parse(words: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m ckd_dist.store",
        description=__doc__,
        usage=f"%(prog)s {{{','.join(COMMANDS)}}} ...",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", prog=parser.prog)
    added = {name: commands.add_parser(name, allow_abbrev=False) for name in COMMANDS[1:]}
    added["unpack"].add_argument("file", type=Path, metavar="FILE", help="of store pack")
    for command in added.values():
        command.add_argument("store", type=Path, metavar="STORE")
    added["pack"].add_argument("file", type=Path, metavar="FILE", help="the new file, a tar")
    added["pack"].add_argument("--licence", required=True, help="on what terms others may use it, for the card")
    added["pack"].add_argument(
        "--checkpoints", type=_epoch, nargs="+", default=[], metavar="EPOCH", help="which of them (all)"
    )
    added["pack"].add_argument("--views", type=int, metavar="N", help="the first N views (all)")
    added["compare"].add_argument(
        "--bytes", type=int, nargs="+", default=[], metavar="N", help="sizes of transform (16 28 54)"
    )
    added["compare"].add_argument("--checkpoint", type=_epoch, metavar="EPOCH", help="of which checkpoint (the last)")
    for name in ("info", "verify", "compare"):
        added[name].add_argument("--json", action="store_true", help="print JSON")
    added["convert"].add_argument("new", type=Path, metavar="NEW", help="folder of the new store")
    for name in ("verify", "repair", "convert"):
        needed = name != "verify"
        if name != "convert":
            added[name].add_argument(
                "--teacher.run", dest="run", metavar="RUN", required=needed, help="the teacher's run"
            )
            added[name].add_argument(
                "--teacher.name", dest="name", metavar="NAME", help="its name in a store of several"
            )
            added[name].add_argument(
                "--teacher.model", dest="model", metavar="NAME", help="its network, where that is code of your own"
            )
        added[name].add_argument("--data.train", dest="train", metavar="X.beton", required=needed, help="its images")
    for name in ("verify", "repair"):
        added[name].add_argument(
            "--data.batch_size", dest="batch_size", type=int, default=128, metavar="N", help="images a pass (128)"
        )
    added["verify"].add_argument(
        "--records", type=int, default=256, metavar="N", help="records of each checkpoint to compute anew (256)"
    )
    codec = added["convert"]
    codec.add_argument("--codec", required=True, help="dense, transform, topk or sampled")
    codec.add_argument("--k", help="topk and sampled: classes kept")
    codec.add_argument("--bytes", help="transform: bytes of a record")
    codec.add_argument("--dtype", help="dense: float16 or bfloat16")
    codec.add_argument("--sample_temperature", metavar="T", help="sampled: temperature of the softmax")
    return parser.parse_args(words)


# ------------------------------------------------------------------------------------------- plan, info


def plan(config: PlanConfig) -> int:
    """Print what a caching takes; returns 1 when it does not fit on the disk."""
    from ckd_dist.core import dist
    from ckd_dist.core.console import format_seconds
    from ckd_dist.store.plan import TimedPlan, plan
    from ckd_dist.store.size import format_bytes

    with dist.process_group() as device:
        found = plan(config, device)
        rank, world = dist.rank(), dist.world_size()
    fits = found.missing_bytes <= found.free_bytes
    if rank:
        return 0 if fits else 1
    if config.json:
        print(json.dumps(asdict(found), indent=2))
        return 0 if fits else 1
    size, free = format_bytes(found.bytes), format_bytes(found.free_bytes)
    rows = {
        "size": f"{size} ({found.bytes:,} bytes) in {found.files:,} files",
        "largest shard": format_bytes(found.largest_shard_bytes),
        "free on the disk": free if fits else f"[red]{free}: it does not fit[/]",
        "to write": f"{found.missing_records:,} records, {format_bytes(found.missing_bytes)}",
    }
    if isinstance(found, TimedPlan):
        rows |= {
            "time": f"{format_seconds(found.seconds)} ({found.seconds:.1f} s) on {world} process{'es' * (world > 1)}",
            "one teacher, online": f"{1e6 * found.teacher_seconds_an_image:,.0f} µs an image; a student of "
            f"{config.views} epochs waits {format_seconds(found.online_seconds)} for it",
            "caching pays": f"from {found.students} student{'s' * (found.students > 1)} on, each taught by one "
            "checkpoint",
        }
        if found.enough_seconds and not found.choices:
            rows["codecs"] = f"to see what they would keep of these logits, --trial_seconds {found.enough_seconds}"
    _print_table(config.store, rows)
    if isinstance(found, TimedPlan) and found.choices:
        sizes = [format_bytes(each.store_bytes) for each in found.choices]
        _print_codecs([each.keeps for each in found.choices], sizes)
    return 0 if fits else 1


def _print_table(title: str, rows: dict[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    Console(highlight=False).print(table)


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
        print(json.dumps({**manifest.identity, "checkpoints": members}, indent=2))
        return 0
    dataset, forward = manifest.dataset, manifest.forward
    codec = ", ".join(f"{value}" if key == "name" else f"{key} {value}" for key, value in manifest.codec.items())
    console = Console(highlight=False)
    console.print(
        f"{store}: {dataset['count']:,} images of {dataset['name']} ({dataset['num_classes']} classes), "
        f"views: {manifest.recipe['kind']}, seed {manifest.view_seed}\n"
        f"logits: {codec}; of {forward['image_size']} px images, forward pass {forward['amp']}"
    )
    table = Table()
    for column in ("checkpoint", "model", "weights sha256", "views", "shards", "bytes"):
        table.add_column(column, justify="right" if column in ("views", "shards", "bytes") else "left")
    for member in members:
        numbers = str(member["views"]), f"{member['written']} of {member['shards']}", f"{member['bytes']:,}"
        table.add_row(member["name"], member["model"], member["weights_sha256"][:12], *numbers)
    console.print(table)
    return 0


# ------------------------------------------------------------------------------------------- verify, repair, convert


def verify(options: argparse.Namespace) -> int:
    """Compare every shard with its checksum and, given the teacher, records with its logits; returns 1 for any
    difference."""
    from ckd_dist.core import dist
    from ckd_dist.data.beton import open_beton
    from ckd_dist.store.check import faults
    from ckd_dist.store.manifest import Manifest
    from ckd_dist.store.reader import as_cached
    from ckd_dist.store.recording import image_digests
    from ckd_dist.store.verify import TOLERANCE, recompute

    require(not options.run or bool(options.train), "--teacher.run needs the images: give --data.train too")
    manifest = Manifest.load(options.store, "STORE")
    total = sum(len(manifest.checkpoint_shards(name)) for name in manifest.checkpoints)
    result: dict = {"shards": total}
    with dist.process_group() as device:
        bad = [fault for _, fault in faults(options.store, manifest)]
        result["bad"] = bad
        if options.train and not bad:
            images = as_cached(open_beton(options.train, "data.train"), manifest, "STORE", options.store)
            note = manifest.decoding_note(image_digests(manifest, images))
            result["images"] = note or f"{options.train} is what it is of"
        if options.run and not bad:
            loader = LoaderConfig(batch_size=options.batch_size)
            members = manifest.members_of(options.name)
            off = recompute(options.store, images, options.run, members, loader, device, options.records, options.model)
            result.update(recomputed=options.records * len(members), off=off, tolerance=TOLERANCE)
        rank = dist.rank()
    status = 1 if bad or result.get("off") else 0
    if rank:
        return status
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        print(*bad, f"{options.store}: {total - len(bad)} of {total} shards are good", sep="\n")
        if "images" in result:
            print(result["images"])
        if "off" in result:
            lines = [f"{where}: deviates by {deviation:.3g}" for where, deviation in result["off"]]
            good = result["recomputed"] - len(lines)
            lines.append(f"{good} of {result['recomputed']} records are the teacher's, within {TOLERANCE}")
            print(*lines, sep="\n")
    return status


def repair(options: argparse.Namespace) -> int:
    """Compute anew what is missing or bad."""
    from ckd_dist.core import dist
    from ckd_dist.store.repair import repair

    with dist.process_group() as device:
        repair(options.store, options.train, options.run, options.name, options.batch_size, device, options.model)
    return 0


def convert(options: argparse.Namespace) -> int:
    """Write a dense store once more with another codec; goes on where a killed one stopped."""
    from ckd_dist.core import dist
    from ckd_dist.store.convert import convert, describe_converted

    given = {name: getattr(options, name) for name in ("codec", "k", "bytes", "dtype", "sample_temperature")}
    config = load_config(CodecConfig, [f"--{name}={value}" for name, value in given.items() if value is not None])
    wanted = describe_converted(options.store, options.train, config)
    with dist.process_group():
        convert(options.store, options.new, options.train, wanted)
    return 0


def compare(options: argparse.Namespace) -> int:
    """Show codecs beside each other."""
    from ckd_dist.store.compare import SIZES, compare

    require(all(2 <= size <= 4096 for size in options.bytes), f"bytes is {options.bytes}: give 2 to 4096 each")
    found = compare(options.store, options.checkpoint, options.bytes or SIZES)
    if options.json:
        print(json.dumps([asdict(each) for each in found], indent=2))
        return 0
    _print_codecs(found)
    return 0


def _print_codecs(found: list[Comparison], stores: list[str] | None = None) -> None:
    """Codecs beside each other, with the size of the `stores` that they would make."""
    from rich.console import Console
    from rich.table import Table

    from ckd_dist.store.compare import TEMPERATURES

    table = Table(title="share of the teacher's divergence that is lost, on images that no basis was fitted to")
    for column in ("codec", "bytes", *(["store"] if stores else []), *(f"T = {t}" for t in TEMPERATURES), "top-1 kept"):
        table.add_column(column, justify="left" if column == "codec" else "right")
    table.add_column("losses")
    fitted_to = max(each.fitted_to or 0 for each in found)
    table.caption = f"bases of transform fitted to {fitted_to:,} records; of a store, to 10,000 where there are as many"
    for number, each in enumerate(found):
        lost = (f"{100 * share:.2f} %" for share in each.lost.values())
        losses = "all" if len(each.losses) == 6 else ", ".join(each.losses)
        sizes = [f"{each.bytes:,}", *(stores[number : number + 1] if stores else [])]
        table.add_row(each.codec["name"], *sizes, *lost, f"{100 * each.top1:.1f} %", losses)
    Console(highlight=False, width=120).print(table)


def pack(options: argparse.Namespace) -> int:
    """Write one file of a store."""
    from ckd_dist.core import dist
    from ckd_dist.store.archive import pack
    from ckd_dist.store.size import format_bytes

    with dist.process_group():
        pack(options.store, options.file, options.checkpoints, options.views, options.licence)
    print(f"{options.file}: {format_bytes(options.file.stat().st_size)}; its README.md says what it is")
    return 0


def unpack(options: argparse.Namespace) -> int:
    """Make a store of one file."""
    from ckd_dist.core import dist
    from ckd_dist.store.archive import unpack

    with dist.process_group():
        manifest = unpack(options.file, options.store)
    names, data = ", ".join(map(str, manifest.members)), manifest.dataset
    print(f"{options.store}: checkpoints {names} on {data['count']:,} images of {data['name']}, all as packed")
    return 0


def _epoch(word: str) -> int | str:
    return int(word) if word.isdecimal() else word


if __name__ == "__main__":
    run_process(main)
