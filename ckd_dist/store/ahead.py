"""Each epoch's records checked, and of a store that outgrows the memory read into it, while the epoch before is
trained on.

Rows of two kilobytes in random order are what disks, and networks even more, are slowest at, and large pieces what they
are best at: so a view is read whole before it is needed. The processes of a node share the work and the memory.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence

from ckd_dist.core import dist, memory
from ckd_dist.core.console import say
from ckd_dist.store.reader import StoreReader
from ckd_dist.store.records import HeldView, View
from ckd_dist.store.size import format_bytes, shard_size

OPTION = "teacher.read_ahead"


class ReadAhead:
    """Has the records of a training ready, epoch after epoch."""

    def __init__(self, reader: StoreReader, epochs: Sequence[set[View]], budget: int | None = None):
        """`epochs`: what each of them reads. `budget`: bytes of memory on each node for it; default: none where the
        store fits in half of the memory, so that the system keeps what it has read, else a quarter of the memory.
        Collective.

        What fits into the budget twice is read into it an epoch ahead, what fits once when its epoch begins. The rest
        is read from its files, row by row.
        """
        self._reader, self._epochs = reader, epochs
        if budget is None:
            budget = memory.limit() // 4 if reader.outgrows_memory else 0
        most = max(map(self._bytes, epochs))
        self._copies = most <= budget
        both = max((self._bytes(now | then) for now, then in itertools.pairwise(epochs)), default=0)
        self._in_time = not self._copies or both <= budget
        self._node = dist.node_ranks()
        self._ready: set[View] = set()
        self._reading: _Reading | None = None
        if budget:
            how = "while the one before is trained on" if self._in_time else "when the epoch begins"
            how = f"in memory, {how}" if self._copies else f"row by row: {OPTION} gives {format_bytes(budget)} for them"
            say(f"{reader.store}: an epoch's records, {format_bytes(most)}, are read {how}")

    def begin(self, epoch: int) -> None:
        """Have the records of an epoch ready, and the next one's on their way; collective. Raises `UserError`, on every
        rank, for a shard that is missing or bad."""
        needed = self._epochs[epoch]
        following = self._epochs[epoch + 1] if epoch + 1 < len(self._epochs) and self._in_time else set()
        self._finish()
        if self._copies:
            self._ready &= needed
            self._reader.release(needed)
        self._start(needed)
        self._finish()
        self._start(following)

    def _bytes(self, views: set[View]) -> int:
        manifest = self._reader.manifest
        return sum(shard_size(manifest, shard) for each in views for shard in manifest.shards(*each))

    def _start(self, views: set[View]) -> None:
        new = sorted(views - self._ready)
        if not new:
            return
        manifest = self._reader.manifest
        held: dict[View, HeldView | None] = dict.fromkeys(new)
        if self._copies:
            memories = memory.shared([self._bytes({each}) for each in new], self._node, OPTION)
            for each, own in zip(new, memories, strict=True):
                held[each] = HeldView(manifest, manifest.shards(*each), own)
        self._reading = _Reading(self._reader, held, self._node.index(dist.rank()), len(self._node))
        self._reading.start()

    def _finish(self) -> None:
        if self._reading is None:
            return
        reading, self._reading = self._reading, None
        with dist.uneven_work():
            reading.wait()
        found = [each for faults in dist.gather_objects(reading.faults) for each in faults]
        self._reader.require_no(found)
        self._reader.take(reading.views)
        self._ready |= reading.views.keys()


class _Reading(threading.Thread):
    """Reads one part of some views' shards, of several."""

    def __init__(self, reader: StoreReader, views: dict[View, HeldView | None], part: int, parts: int):
        super().__init__(daemon=True, name="read ahead")
        self.views = views
        self.faults: list[str] = []
        self._reader, self._part, self._parts = reader, part, parts
        self._error: BaseException | None = None

    def run(self) -> None:
        """Read; what is wrong is in `faults`."""
        shards = [(view, shard) for view in self.views for shard in self._reader.manifest.shards(*view)]
        try:
            for view, shard in shards[self._part :: self._parts]:
                held = self.views[view]
                if fault := self._reader.fault(shard, into=held.file(shard) if held else None):
                    self.faults.append(fault)
        except BaseException as error:  # for the main thread
            self._error = error

    def wait(self) -> None:
        """Until all is read; raises what ended it."""
        while self.is_alive():
            self.join(0.1)  # signals are heard between these
        if self._error:
            raise self._error
