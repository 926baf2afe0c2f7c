"""Making a store, or letting it grow by checkpoints and views."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ckd_dist.core.console import say
from ckd_dist.core.errors import require
from ckd_dist.core.options import Amp
from ckd_dist.store.manifest import Manifest
from ckd_dist.store.size import require_space
from ckd_dist.store.writer import clear_leftovers, locked


def create_or_extend(store: Path, wanted: Manifest) -> Manifest:
    """Make the store, or let it grow by what is `wanted`, and return what it is to hold then; raises `UserError`,
    before anything is made, where that is something else or does not fit on the disk."""
    manifest = merged(store, wanted)
    clear_leftovers(store)
    require_space(store, manifest)
    with locked(store) as has_locks:
        if not has_locks:
            say(f"warning: {store}: this file system has no locks: let no two commands write to a store at once")
        manifest = merged(store, wanted)
        open_store(store, manifest)
    return manifest


def merged(store: Path, wanted: Manifest) -> Manifest:
    """The manifest of `store` with the checkpoints of `wanted` and their views added; `wanted` where there is no store
    yet.

    Raises `UserError` naming the field that differs when the store holds other logits.
    """
    # In this order: another command may be making the store, and all but these come after the manifest.
    beginning = (".lock", ".manifest.json.")
    foreign = store.exists() and any(not path.name.startswith(beginning) for path in store.iterdir())
    if not (store / "manifest.json").exists():
        require(
            not foreign,
            f"store: {store} is not empty and has no manifest.json: choose another --store",
        )
        return wanted
    found = Manifest.load(store, "store")
    found.require_same(wanted, f"store: {store}", "this command")
    checkpoints = dict(found.checkpoints)
    for name, values in wanted.checkpoints.items():
        known = found.checkpoints.get(name, values)
        checkpoints[name] = {**known, "views": max(known["views"], values["views"])}
        require(
            known == {**values, "views": known["views"]},
            f"store: {store} holds {name} of a model {known['model']} with weights "
            f"{known['weights_sha256'][:12]}, this run has {values['model']} {values['weights_sha256'][:12]}: "
            "choose another --store",
        )
    require(
        not found.classes or not wanted.classes or found.classes == wanted.classes,
        f"store: {store} is of a teacher with other names of classes: choose another --store",
    )
    return replace(
        found,
        checkpoints=dict(sorted(checkpoints.items())),
        classes=found.classes or wanted.classes,
        paths={**wanted.paths, **found.paths},
    )


def open_store(store: Path, manifest: Manifest) -> None:
    """Create the store, or let it grow to what `manifest`, of `merged`, says."""
    store.mkdir(parents=True, exist_ok=True)
    path = store / "manifest.json"
    if not path.exists() or path.read_bytes() != manifest.content():
        manifest.save(store)


def held_amp(store: Path) -> Amp | None:
    """Precision of the logits that `store` holds, None where there is no store yet."""
    return Manifest.load(store, "store").forward["amp"] if (store / "manifest.json").exists() else None
