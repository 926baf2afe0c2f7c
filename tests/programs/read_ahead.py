"""Ranks read a store ahead together: each its part of the files, all the same records; prints what each has read."""

import json
import sys
import threading

import numpy as np

from ckd_dist.core import dist
from ckd_dist.store import reader as readers
from ckd_dist.store.ahead import ReadAhead
from ckd_dist.store.reader import StoreReader

store, budget = sys.argv[1], int(sys.argv[2])
own: list[str] = []
comparing = False
whole = readers.shard_fault


def noting(folder, manifest, shard, *arguments, content=True, **options):
    if content and not (comparing and threading.current_thread() is threading.main_thread()):
        own.append(str(shard.path(folder)))
    return whole(folder, manifest, shard, *arguments, content=content, **options)


with dist.process_group():
    reader, other = StoreReader(store, [1, 3]), StoreReader(store, [1, 3])
    ahead = ReadAhead(reader, [reader.views_of([0, 1], view) for view in (0, 1, 1, 0)], budget)
    readers.shard_fault = noting
    ids = np.random.default_rng(0).permutation(reader.manifest.dataset["count"])
    for epoch, view in enumerate((0, 1, 1, 0)):
        ahead.begin(epoch)
        found = reader.rows(ids, view)
        dist.barrier()  # nobody reads the files in the loader's way while another counts
        comparing = True  # what this thread reads for it is not counted; what is read ahead meanwhile is
        assert (found == other.rows(ids, view)).all()
        comparing = False
    everyone = dist.gather_objects(own)
    if dist.rank() == 0:
        print(json.dumps(everyone))
