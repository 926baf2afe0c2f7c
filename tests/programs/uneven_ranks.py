"""Two ranks check and write shards of the store that the command names, one for longer than a collective waits."""

import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch.distributed as td

from ckd_dist.core import dist
from ckd_dist.store import check, recording
from ckd_dist.store.manifest import Manifest

store = Path(sys.argv[1])
manifest = Manifest.load(store, "")
name = next(iter(manifest.checkpoints))


def slowly(*_):
    time.sleep(1.5 * dist.rank())
    yield 1


with dist.process_group():
    set_timeout = getattr(td, "set_timeout", td.distributed_c10d._set_pg_timeout)  # as older ones call it
    set_timeout(timedelta(seconds=1), td.group.WORLD)
    check.shard_fault = lambda *_, **__: list(slowly()) and None
    assert check.faults(store, manifest, [name]) == []
    recorder = SimpleNamespace(manifest=manifest, fit=lambda *_: None, load=lambda _: {}, write=slowly)
    recording.write_work(store, recorder, [([name], [[shard] for shard in manifest.shards(name, 0)])])
