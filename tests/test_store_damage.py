"""Nothing wrong is read: every kind of damage to a store is refused by the name of the file or field, before a row of
it reaches a student; what does no harm is not."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest

from ckd_dist import data
from ckd_dist.config import UserError, flatten
from ckd_dist.store import manifest as manifests
from ckd_dist.store.manifest import Manifest, Shard
from ckd_dist.store.reader import StoreReader
from ckd_dist.store.writer import ShardWriter

SHARD = Shard("epoch_0003", 1, 250, 499)
NAME = r"epoch_0003/view_0001/samples_00000250-00000499"


def read(store, fashion, split="train", **changes):
    info = dataclasses.replace(data.read_info(fashion[split], ""), **changes)
    reader = StoreReader(str(store), [1, 2, 3], info)
    reader.check_shards()
    return reader.rows(np.arange(info.count), 1)


def flip_bit(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


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


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


def replace_by_dangling_link(path):
    path.unlink()
    path.symlink_to("nowhere")


CHECKSUM = "does not match its checksum"
SHARDS = {
    # name: (what to do with the store and the .npy file, what the message says)
    "bit of a logit": (lambda s, p: flip_bit(p, -1), CHECKSUM),
    "bit of the header": (lambda s, p: flip_bit(p, 30), CHECKSUM),
    "bit of the magic": (lambda s, p: flip_bit(p, 0), CHECKSUM),
    "one byte short": (lambda s, p: os.truncate(p, p.stat().st_size - 1), CHECKSUM),
    "one record short": (lambda s, p: os.truncate(p, p.stat().st_size - 20), CHECKSUM),
    "empty": (lambda s, p: os.truncate(p, 0), CHECKSUM),
    "one byte longer": (lambda s, p: p.write_bytes(p.read_bytes() + b"\0"), CHECKSUM),
    "missing": (lambda s, p: p.unlink(), r"\.npy is missing"),
    "a dangling link": (lambda s, p: replace_by_dangling_link(p), r"\.npy is missing"),
    "a folder": (lambda s, p: replace_by_folder(p), r"\.npy cannot be read \(Is a directory\)"),
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
    "as float32": (lambda s, p: save_as(p, np.load(p).astype(np.float32)), CHECKSUM),
    "in another order": (lambda s, p: save_as(p, np.asfortranarray(np.load(p))), CHECKSUM),
    "as a pickle": (lambda s, p: save_as(p, np.load(p).astype(object), allow_pickle=True), CHECKSUM),
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
    "JSON nothing": (lambda s, p: p.with_suffix(".json").write_text("{}"), "has identity None"),
    "JSON of the next shard": (
        lambda s, p: shutil.copy(p.with_name("samples_00000500-00000749.json"), p.with_suffix(".json")),
        "has first 500, the manifest says 250"),
    "bit of the JSON's checksum": (lambda s, p: flip_bit(p.with_suffix(".json"), -6), CHECKSUM),
    **{
        f"JSON's {key}": (sidecar(lambda values, key=key, value=value: {**values, key: value}), expected)
        for key, value, expected in (
            ("identity", "0" * 64, "has identity 0000"),
            ("weights_sha256", "0" * 64, "has weights_sha256 0000"),
            ("checkpoint", "epoch_0002", "has checkpoint epoch_0002, the manifest says epoch_0003"),
            ("view", 0, "has view 0, the manifest says 1"),
            ("first", 0, "has first 0, the manifest says 250"),
            ("last", 500, "has last 500, the manifest says 499"),
            ("sha256", "0" * 64, CHECKSUM),
        )
    },
    **{
        f"JSON without {key}": (
            sidecar(lambda values, key=key: {k: v for k, v in values.items() if k != key}), f"has {key} None")
        for key in ("identity", "weights_sha256", "checkpoint", "view", "first", "last")
    },
    "JSON without sha256": (sidecar(lambda values: {k: v for k, v in values.items() if k != "sha256"}), CHECKSUM),
}  # fmt: skip


def manifest(store):
    return Manifest.load(store, "")


@pytest.mark.parametrize("kind", [*SHARDS, *SIDECARS])
def test_a_damaged_shard_is_refused_by_name(copy, fashion, kind):
    damage, expected = {**SHARDS, **SIDECARS}[kind]
    read(copy, fashion)
    damage(copy, SHARD.path(copy))
    name = f"({NAME}|epoch_0002/view_0001|epoch_0003/view_0000)" if "swapped" in kind else NAME
    with pytest.raises(UserError, match=rf"teacher\.store: .*{name}.*{expected}.*: run .*ckd_dist\.store repair"):
        read(copy, fashion)


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
    "views", "checkpoints.epoch_0003.epoch", "checkpoints.epoch_0003.model", "checkpoints.epoch_0003.weights_sha256",
    "images.0", "checksum",
]  # fmt: skip


def other_value(value):
    if isinstance(value, str):
        return "x" + value[1:]
    return [*value[:-1], value[-1] + 1] if isinstance(value, list) else value + 1


def test_fields_are_all_that_a_manifest_has(store):
    known = flatten(json.loads((store / "manifest.json").read_text()))
    others = {k for k in known if k.startswith(("images.", "checkpoints.epoch_0001", "checkpoints.epoch_0002"))}
    assert known.keys() == set(FIELDS) | others


@pytest.mark.parametrize("field", FIELDS)
def test_an_edited_manifest_is_refused(copy, fashion, field):
    path = copy / "manifest.json"
    values = json.loads(path.read_text())
    assign(values, field, other_value(flatten(values)[field]))
    path.write_text(json.dumps(values))
    expected = "has format 3, this version reads 2" if field == "format" else CHECKSUM
    with pytest.raises(UserError, match=rf"teacher\.store: .*manifest\.json {expected}"):
        read(copy, fashion)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        *(
            (lambda m, key=key: assign(m, key, other_value(flatten(m)[key])), r"epoch_0001.* has identity")
            for key in FIELDS
            if key.split(".")[0] in ("recipe", "view_seed", "forward") or key == "dataset.name"
        ),
        (lambda m: assign(m, "dataset.content_hash", "x"), "is of images with content_hash x, data.train has"),
        (lambda m: assign(m, "dataset.count", 1200), "is of images with count 1200, data.train has 1201"),
        (lambda m: assign(m, "dataset.num_classes", 11), "is of images with num_classes 11, data.train has 10"),
        (lambda m: assign(m, "codec", {"name": "zip"}), r"manifest\.json is damaged \('zip'\)"),
        (lambda m: assign(m, "codec.dtype", "bfloat16"), "epoch_0001.* has identity"),
        (lambda m: assign(m, "codec", {"name": "topk", "k": 4}), "epoch_0001.* has identity"),
        (lambda m: assign(m, "shard_size", 251), r"samples_00000000-00000250\.json is missing"),
        (lambda m: assign(m, "shard_size", 0), r"manifest\.json is damaged"),
        (lambda m: assign(m, "views", 3), r"view_0002/samples_00000000-00000249\.json is missing"),
        (lambda m: assign(m, "checkpoints.epoch_0002.epoch", 7), r"no checkpoint of epoch 2; there are 1, 3, 7"),
        (lambda m: assign(m, "checkpoints.epoch_0002.weights_sha256", "0"), "epoch_0002.* has weights_sha256"),
        (lambda m: m["checkpoints"].pop("epoch_0002") and None, r"no checkpoint of epoch 2; there are 1, 3"),
        (lambda m: {k: v for k, v in m.items() if k != "recipe"}, r"manifest\.json is damaged"),
        (lambda m: assign(m, "licence", "MIT"), r"manifest\.json is damaged"),
        (lambda m: assign(m, "format", 3), "has format 3, this version reads 2"),
        (lambda m: assign(m, "format", 1), "has format 1, this version reads 2"),
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
        (lambda path: flip_bit(path, path.read_text().index("sha256:") + 10), CHECKSUM),
    ],
    ids=["missing", "empty", "cut short", "not text", "a list", "bit"],
)
def test_a_damaged_manifest_is_refused(copy, fashion, damage, expected):
    damage(copy / "manifest.json")
    with pytest.raises(UserError, match=rf"teacher\.store: .*{expected}"):
        read(copy, fashion)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"split": "holdout"}, "is of images with content_hash"),
        ({"content_hash": "sha256:other"}, "is of images with content_hash .*, data.train has sha256:other"),
        ({"count": 1200}, "is of images with count 1201, data.train has 1200"),
        ({"num_classes": 100}, "is of images with num_classes 10, data.train has 100"),
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
    info = data.read_info(fashion["train"], "")
    reader = StoreReader(str(copy), [1, 2], info)
    reader.check_shards()
    assert len(reader.rows(np.arange(10), 1)) == 10
