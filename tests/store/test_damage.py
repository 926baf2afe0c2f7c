"""Nothing wrong is read: every kind of damage to a store is refused by the name of the file or field, before a row of
it reaches a student; what does no harm is not."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
import xxhash

from ckd_dist.core.errors import UserError
from ckd_dist.core.options import flatten
from ckd_dist.data import dataset
from ckd_dist.store import manifest as manifests
from ckd_dist.store.manifest import Manifest, Shard
from ckd_dist.store.reader import StoreReader
from ckd_dist.store.writer import ShardWriter
from tests.helpers.stores import damage_at

SHARD = Shard("epoch_0003", 1, 250, 499)
NAME = r"epoch_0003/view_0001/samples_00000250-00000499"


def read(store, fashion, split="train", **changes):
    info = dataclasses.replace(dataset.read_info(fashion[split], ""), **changes)
    reader = StoreReader(str(store), [1, 2, 3], info)
    reader.check_shards()
    return reader.rows(np.arange(info.count), 1)


def read_unchecked(store, fashion):
    """As a training does: contents are looked at when they are read."""
    reader = StoreReader(str(store), [1, 2, 3], dataset.read_info(fashion["train"], ""))
    reader.rows(np.arange(1201), 0)
    return reader.rows(np.arange(1201), 1)


def transplant(store, **changes):
    """Put a whole shard with its JSON, of a store that differs in `changes`, in the place of ours."""
    manifest = Manifest.load(store, "")
    other = store.parent / "other"
    foreign = dataclasses.replace(manifest, **changes)
    writer = ShardWriter(other, SHARD, foreign)
    records = np.load(SHARD.path(store)).view(np.uint8)
    size = foreign.recorded.array(1)[0].itemsize * int(np.prod(foreign.recorded.array(1)[1]))
    writer.append(np.resize(records, (SHARD.count, size)))
    writer.commit()
    for suffix in (".npy", ".json"):
        shutil.copy(SHARD.path(other).with_suffix(suffix), SHARD.path(store).with_suffix(suffix))


def swap(a, b):
    for suffix in (".npy", ".json"):
        x, y = a.with_suffix(suffix), b.with_suffix(suffix)
        content = x.read_bytes()
        x.write_bytes(y.read_bytes())
        y.write_bytes(content)


def save_as(path, values, **options):
    path.unlink()
    np.save(path, values, **options)


def with_digest(path):
    return lambda found: {**found, "xxh3_128": xxhash.xxh3_128_hexdigest(path.read_bytes())}


def save_with_checksum(path, values):
    """Other values under a good checksum, as a broken writer or a forger would leave them."""
    save_as(path, values)
    sidecar(with_digest(path))(None, path)


def replace_by_folder(path):
    path.unlink()
    path.mkdir()
    (path / "notes.txt").write_text("x")


def replace_by_fifo(path):
    path.unlink()
    os.mkfifo(path)


def replace_view_by_file(path):
    shutil.rmtree(path.parent)
    path.parent.write_text("x")


def replace_by_dangling_link(path):
    path.unlink()
    path.symlink_to("nowhere")


CHECKSUM = "does not match its checksum"
HEADER = r"is no shard of this store \(it does not begin as a \.npy file does\)"
HOLDS = r"is no shard of this store \(it holds"
SHARDS = {
    # name: (what to do with the store and the .npy file, what the message says)
    "bit of a logit": (lambda s, p: damage_at(p, -1), CHECKSUM),
    "bit of the header": (lambda s, p: damage_at(p, 30), HEADER),
    "bit of the magic": (lambda s, p: damage_at(p, 0), HEADER),
    "one byte short": (lambda s, p: os.truncate(p, p.stat().st_size - 1), "it has 5,127 bytes of 5,128"),
    "one record short": (lambda s, p: os.truncate(p, p.stat().st_size - 20), "it has 5,108 bytes of 5,128"),
    "empty": (lambda s, p: os.truncate(p, 0), HEADER),
    "one byte longer": (lambda s, p: p.write_bytes(p.read_bytes() + b"\0"), "it has 5,129 bytes of 5,128"),
    "missing": (lambda s, p: p.unlink(), r"\.npy is missing"),
    "a dangling link": (lambda s, p: replace_by_dangling_link(p), r"\.npy is missing"),
    "a folder": (lambda s, p: replace_by_folder(p), r"\.npy is not a regular file"),
    "a FIFO": (lambda s, p: replace_by_fifo(p), r"\.npy is not a regular file"),
    "its folder a file": (lambda s, p: replace_view_by_file(p), r"\.json cannot be read \(Not a directory\)"),
    "content of the next shard": (lambda s, p: shutil.copy(p.with_name("samples_00000500-00000749.npy"), p), CHECKSUM),
    "content of the other view": (lambda s, p: shutil.copy(s / "epoch_0003/view_0000" / p.name, p), CHECKSUM),
    "content of another checkpoint": (lambda s, p: shutil.copy(s / "epoch_0002/view_0001" / p.name, p), CHECKSUM),
    "swapped with the next shard": (
        lambda s, p: swap(p, p.with_name("samples_00000500-00000749.npy")), "has first 500, the manifest says 250"),
    "swapped with the other view": (
        lambda s, p: swap(p, s / "epoch_0003/view_0000" / p.name), "has view 1, the manifest says 0"),
    "swapped with another checkpoint": (
        lambda s, p: swap(p, s / "epoch_0002/view_0001" / p.name), "has weights_sha256"),
    "of another seed": (lambda s, p: transplant(s, view_seed=1), "has identity"),
    "of other images": (lambda s, p: transplant(s, dataset={**manifest(s).dataset, "name": "x"}), "has identity"),
    "of another recipe": (lambda s, p: transplant(s, recipe={**manifest(s).recipe, "flip": 0.0}), "has identity"),
    "of another precision": (
        lambda s, p: transplant(s, forward={**manifest(s).forward, "amp": "float16"}), "has identity"),
    "of another codec": (lambda s, p: transplant(s, codec={"name": "topk", "k": 4}), "has identity"),
    "of another dtype": (
        lambda s, p: transplant(s, codec={"name": "dense", "dtype": "bfloat16"}), "has identity"),
    "of another training of the teacher": (
        lambda s, p: transplant(s, checkpoints={SHARD.checkpoint: {"weights_sha256": "0"}}), "has weights_sha256 0,"),
    **{
        f"{what}, with a good checksum": (lambda s, p, change=change: save_with_checksum(p, change(np.load(p))), held)
        for what, change, held in (
            ("as float32", lambda x: x.astype(np.float32), r"holds float32 \(250, 10\), the codec's are float16"),
            ("as uint16", lambda x: x.view(np.uint16), r"holds uint16 \(250, 10\), the codec's are float16"),
            ("big-endian", lambda x: x.astype(">f2"), r"holds >f2 \(250, 10\), the codec's are float16"),
            ("in another order", np.asfortranarray, r"holds float16 \(250, 10\) in Fortran order, the codec's"),
            ("transposed", np.transpose, r"holds float16 \(10, 250\) in Fortran order, the codec's are float16"),
            ("of other shape", lambda x: x.reshape(10, 250), r"holds float16 \(10, 250\), the codec's are float16"),
            ("one record short", lambda x: x[1:], r"holds float16 \(249, 10\), the codec's are float16"),
        )
    },
    "no array, with a good checksum": (
        lambda s, p: (p.write_bytes(b"x" * 5128), sidecar(with_digest(p))(s, p)), "is no shard of this store"),
    "one byte longer, with a good checksum": (
        lambda s, p: (p.write_bytes(p.read_bytes() + b"x"), sidecar(with_digest(p))(s, p)), "has 5,129 bytes of 5,1"),
    "as float32": (lambda s, p: save_as(p, np.load(p).astype(np.float32)), HOLDS),
    "in another order": (lambda s, p: save_as(p, np.asfortranarray(np.load(p))), HOLDS),
    "as a pickle": (lambda s, p: save_as(p, np.load(p).astype(object), allow_pickle=True), HOLDS),
}  # fmt: skip


def sidecar(change):
    def apply(store, path):
        path = path.with_suffix(".json")
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return apply


SIDECARS = {
    "JSON missing": (lambda s, p: p.with_suffix(".json").unlink(), r"\.json is missing"),
    "JSON empty": (lambda s, p: p.with_suffix(".json").write_text(""), r"\.json is damaged"),
    "JSON cut short": (lambda s, p: os.truncate(p.with_suffix(".json"), 100), r"\.json is damaged"),
    "JSON not text": (lambda s, p: p.with_suffix(".json").write_bytes(b"\xff\xfe\0"), r"\.json is damaged"),
    "JSON a list": (lambda s, p: p.with_suffix(".json").write_text("[]"), r"\.json is damaged"),
    "JSON nothing": (lambda s, p: p.with_suffix(".json").write_text("{}"), r"\.json is damaged \(identity: Field req"),
    "JSON nested deeply": (lambda s, p: p.with_suffix(".json").write_text("[" * 10**5), r"\.json is damaged"),
    "JSON a folder": (lambda s, p: replace_by_folder(p.with_suffix(".json")), r"\.json is not a regular file"),
    "JSON a FIFO": (lambda s, p: replace_by_fifo(p.with_suffix(".json")), r"\.json is not a regular file"),
    "JSON of the next shard": (
        lambda s, p: shutil.copy(p.with_name("samples_00000500-00000749.json"), p.with_suffix(".json")),
        "has first 500, the manifest says 250"),
    "bit of the JSON's checksum": (lambda s, p: damage_at(p.with_suffix(".json"), -6), CHECKSUM),
    **{
        f"JSON's {key} {str(value)[:6]}": (
            sidecar(lambda values, key=key, value=value: {**values, key: value}), expected)
        for key, value, expected in (
            ("identity", "0" * 64, "has identity 0000"),
            ("weights_sha256", "0" * 64, "has weights_sha256 0000"),
            ("checkpoint", "epoch_0002", "has checkpoint epoch_0002, the manifest says epoch_0003"),
            ("view", 0, "has view 0, the manifest says 1"),
            ("first", 0, "has first 0, the manifest says 250"),
            ("last", 500, "has last 500, the manifest says 499"),
            ("last", 499.0, r"\.json is damaged \(last: Input should be a valid integer"),
            ("last", 10**40, "has last 1000"),
            ("last", True, r"\.json is damaged \(last: Input should be a valid integer"),
            ("xxh3_128", "0" * 32, CHECKSUM),
            ("xxh3_128", None, r"\.json is damaged \(it has 0 checksums"),
            ("xxh3_128", 7, r"\.json is damaged \(xxh3_128: Input should be a valid string"),
            ("sha256", "0" * 64, r"\.json is damaged \(it has 2 checksums"),
            ("author", "me", r"\.json is damaged \(author: Unexpected"),
        )
    },
    **{
        f"JSON without {key}": (
            sidecar(lambda values, key=key: {k: v for k, v in values.items() if k != key}), f"{key}: Field required")
        for key in ("identity", "weights_sha256", "checkpoint", "view", "first", "last")
    },
}  # fmt: skip


def manifest(store):
    return Manifest.load(store, "")


@pytest.mark.parametrize("when", [read, read_unchecked], ids=["checked", "first read"])
@pytest.mark.parametrize("kind", [*SHARDS, *SIDECARS])
def test_a_damaged_shard_is_refused_by_name(copy, fashion, kind, when):
    damage, expected = {**SHARDS, **SIDECARS}[kind]
    damage(copy, SHARD.path(copy))
    name = f"({NAME}|epoch_0002/view_0001|epoch_0003/view_0000)" if "swapped" in kind else NAME
    name = "epoch_0003/view_0001/samples_00000000" if kind == "its folder a file" else name
    with pytest.raises(UserError, match=rf"teacher\.store: .*{name}.*{expected}.*: run .*ckd_dist\.store repair"):
        when(copy, fashion)


def edit(store, change):
    """Change manifest.json as a careful forger would: with the checksum that goes with it."""
    path = store / "manifest.json"
    values = json.loads(path.read_text())
    del values["checksum"]
    values = change(values) or values
    path.write_text(json.dumps({**values, "checksum": manifests._checksum(values)}))


def assign(values, key, value):
    *path, last = key.split(".")
    for name in path:
        values = values[name]
    values[last] = value


FIELDS = [
    "format", "dataset.name", "dataset.content_hash", "dataset.count", "dataset.num_classes", "recipe.kind",
    "recipe.scale", "recipe.ratio", "recipe.padding", "recipe.center_share", "recipe.flip", "recipe.color_jitter",
    "recipe.erase", "recipe.mixup", "recipe.cutmix", "view_seed",
    "forward.image_size", "forward.mean", "forward.std", "forward.amp", "codec.name", "codec.dtype", "shard_size",
    *(f"checkpoints.epoch_0003.{key}" for key in ("epoch", "model", "weights_sha256", "views")), "images.0",
    "classes", "checksum",
]  # fmt: skip


def other_value(value):
    if isinstance(value, str):
        return "x" + value[1:]
    return [*value[:-1], other_value(value[-1])] if isinstance(value, list) else value + 1


def test_fields_are_all_that_a_manifest_has(store):
    known = flatten(json.loads((store / "manifest.json").read_text()))
    others = {
        k for k in known if k.startswith(("images.", "paths.", "checkpoints.epoch_0001", "checkpoints.epoch_0002"))
    }
    assert known.keys() == set(FIELDS) | others


@pytest.mark.parametrize("field", FIELDS)
def test_an_edited_manifest_is_refused(copy, fashion, field):
    path = copy / "manifest.json"
    values = json.loads(path.read_text())
    assign(values, field, other_value(flatten(values)[field]))
    path.write_text(json.dumps(values))
    expected = "has format 6, this version reads 2 to 5" if field == "format" else CHECKSUM
    with pytest.raises(UserError, match=rf"teacher\.store: .*manifest\.json {expected}"):
        read(copy, fashion)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        *(
            (lambda m, key=key: assign(m, key, other_value(flatten(m)[key])), r"epoch_0001.* has identity")
            for key in FIELDS
            if key.split(".")[0] in ("recipe", "view_seed", "forward") or key == "dataset.name"
            if key not in ("recipe.kind", "forward.amp")
        ),
        (lambda m: assign(m, "dataset.content_hash", "x"), "is of images with content_hash x, .*train.beton has"),
        (lambda m: assign(m, "dataset.count", 1200), "is of images with count 1200, .*train.beton has 1201"),
        (lambda m: assign(m, "dataset.num_classes", 11), "is of images with num_classes 11, .*train.beton has 10"),
        (lambda m: assign(m, "recipe.kind", "center_crop"), r"epoch_0001.* has identity"),
        (lambda m: assign(m, "forward.amp", "float16"), r"epoch_0001.* has identity"),
        *(
            (lambda m, key=key, value=value: assign(m, key, value), rf"manifest\.json is damaged \({wrong}")
            for key, value, wrong in (
                ("codec", {"name": "zip"}, "codec zip"),
                ("codec", {"name": "topk", "k": 4.0}, "k: Input should be a valid integer"),
                ("codec", {"name": "topk", "k": 10**30}, "k: Input should be less than"),
                ("codec", {"name": "topk", "k": 4, "level": 1}, "level: Unexpected"),
                ("recipe.kind", "mirror", "recipe.kind: Input should be"),
                ("recipe.flip", "0.5", "recipe.flip: Input should be a valid number"),
                ("recipe.colour", 1, "recipe.colour: Unexpected"),
                ("forward.amp", "int8", "forward.amp: Input should be"),
                ("dataset.count", 1201.0, "dataset.count: Input should be a valid integer"),
                ("dataset.count", 10**30, "dataset.count: Input should be less than"),
                ("dataset.num_classes", -1, "dataset.num_classes: Input should be greater than"),
                ("view_seed", None, "view_seed: Input should be a valid integer"),
                ("shard_size", 0, "shard_size: Input should be greater than"),
                ("checkpoints", [], "'list' object|checkpoints: "),
                ("checkpoints.epoch_0002", None, "checkpoints.epoch_0002: Input should be an object"),
                ("checkpoints.epoch_0002.views", 2.0, "checkpoints.epoch_0002.views: Input should be a valid integer"),
                ("checkpoints.epoch_0002.views", 0, "checkpoints.epoch_0002.views: Input should be greater than"),
                ("images", {"0": 0}, "images.0: Input should be a valid string"),
            )
        ),
        (
            lambda m: m["checkpoints"].update({"../epoch_0004": m["checkpoints"]["epoch_0003"]}),
            r"manifest\.json is damaged \(checkpoints\.\.\./epoch_0004\.\[key\]: String should match pattern",
        ),
        (
            lambda m: m["checkpoints"].update({"/etc/epoch_0004": m["checkpoints"]["epoch_0003"]}),
            r"manifest\.json is damaged \(checkpoints\./etc/epoch_0004\.\[key\]: String should match pattern",
        ),
        (lambda m: assign(m, "checkpoints.epoch_0002.views", 10**9), "is damaged: no store has .* shards"),
        (lambda m: assign(m, "codec.dtype", "bfloat16"), "epoch_0001.* has identity"),
        (lambda m: assign(m, "codec", {"name": "topk", "k": 4}), "epoch_0001.* has identity"),
        (lambda m: assign(m, "shard_size", 251), r"samples_00000000-00000250\.json is missing"),
        (
            lambda m: assign(m, "checkpoints.epoch_0002.views", 3),
            r"epoch_0002/view_0002/samples_00000000-00000249\.json is missing",
        ),
        (lambda m: assign(m, "checkpoints.epoch_0002.epoch", 7), r"no checkpoint of epoch 2; there are 1, 3, 7"),
        (lambda m: assign(m, "checkpoints.epoch_0002.weights_sha256", "0"), "epoch_0002.* has weights_sha256"),
        (lambda m: m["checkpoints"].pop("epoch_0002") and None, r"no checkpoint of epoch 2; there are 1, 3"),
        (lambda m: {k: v for k, v in m.items() if k != "recipe"}, r"manifest\.json is damaged"),
        (lambda m: assign(m, "licence", "MIT"), r"manifest\.json is damaged"),
        (lambda m: assign(m, "format", 6), "has format 6, this version reads 2 to 5"),
        (lambda m: assign(m, "format", 2), "is damaged"),
        (lambda m: assign(m, "format", 1), "has format 1, this version reads 2 to 5"),
    ],
)
def test_a_forged_manifest_is_refused(copy, fashion, change, expected):
    edit(copy, change)
    with pytest.raises(UserError, match=rf"teacher\.\w+: .*{expected}"):
        read(copy, fashion)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda path: path.unlink(), "is not a logit store: it has no manifest.json"),
        (lambda path: os.truncate(path, 0), "is damaged"),
        (lambda path: os.truncate(path, 300), "is damaged"),
        (lambda path: path.write_bytes(b"\xff" + path.read_bytes()), "is damaged"),
        (lambda path: path.write_text("[]"), "is damaged"),
        (lambda path: path.write_text("[" * 10**5), "is damaged"),
        (lambda path: path.write_text('{"format": 1' + 5000 * "0" + "}"), "is damaged|has format"),
        (replace_by_folder, "is not a regular file"),
        (replace_by_fifo, "is not a regular file"),
        (lambda path: damage_at(path, path.read_text().index("sha256:") + 10), CHECKSUM),
    ],
    ids=["missing", "empty", "cut short", "not text", "a list", "nested deeply", "huge", "a folder", "a FIFO", "bit"],
)
def test_a_damaged_manifest_is_refused(copy, fashion, damage, expected):
    damage(copy / "manifest.json")
    with pytest.raises(UserError, match=rf"teacher\.store: .*{expected}"):
        read(copy, fashion)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"split": "holdout"}, "is of images with content_hash"),
        ({"content_hash": "sha256:other"}, "is of images with content_hash .*, .* has sha256:other"),
        ({"count": 1200}, "is of images with count 1201, .* has 1200"),
        ({"num_classes": 100}, "is of images with num_classes 10, .* has 100"),
    ],
)
def test_a_store_of_other_images_is_refused(store, fashion, asked, expected):
    with pytest.raises(UserError, match=rf"teacher\.store: .*{expected}"):
        read(store, fashion, **asked)


def test_what_does_no_harm_is_not_refused(copy, store, fashion):
    (copy / "README.txt").write_text("do not delete before the deadline")
    (copy / "epoch_0003" / "view_0001" / "notes.json").write_text("{}")
    (copy / "epoch_0003" / "view_0001" / ".samples_00000250-00000499.npy.tmp").write_bytes(b"left by a kill")
    (copy / "epoch_0099").mkdir()
    np.testing.assert_array_equal(read(copy, fashion), read(store, fashion))


def test_a_damaged_checkpoint_does_not_bar_the_others(copy, fashion):
    SHARD.path(copy).unlink()
    info = dataset.read_info(fashion["train"], "")
    reader = StoreReader(str(copy), [1, 2], info)
    reader.check_shards()
    assert len(reader.rows(np.arange(10), 1)) == 10
