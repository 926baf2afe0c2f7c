"""Where the time of a training goes on a device: kernels, copies, and gaps in which the host was waited for.

  python -m ckd_dist.bench.profile RUN_DIR [--distill's options]

Trains as `distill` does with these options, under torch's profiler, and looks at the second half of what was recorded.
Prints one JSON object, and leaves trace.json, for Perfetto or chrome://tracing, in RUN_DIR.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ckd_dist.core.process import run_process

MOST = 12
"""Kernels that are named."""


class Span(NamedTuple):
    """Something that ran on the device; times in microseconds."""

    name: str
    start: float
    stop: float

    @property
    def is_copy(self) -> bool:
        """Whether it moves or fills memory."""
        return self.name.startswith(("Memcpy", "Memset"))


def main() -> None:
    """Train, and tell."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        sys.exit(0 if {"-h", "--help"} & set(sys.argv[1:]) else 2)
    from torch import profiler

    from ckd_dist.core import dist
    from ckd_dist.core.options import load_config
    from ckd_dist.data.beton import open_images
    from ckd_dist.train import students
    from ckd_dist.train.options import DistillConfig

    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    config = load_config(DistillConfig, [*sys.argv[2:], "--run_dir", str(folder / "run")])
    activities = profiler.supported_activities()
    with dist.process_group() as device, profiler.profile(activities=activities) as profile:
        students.train([config], open_images(config.data, "train", "val"), device)
    profile.export_chrome_trace(str(folder / "trace.json"))
    print(json.dumps(shares(on_device(folder / "trace.json")), indent=1))


def on_device(trace: Path) -> list[Span]:
    """What ran on the GPU; without one, the operations of the busiest thread that are part of no other."""
    events = [event for event in json.loads(trace.read_text(encoding="utf-8"))["traceEvents"] if "dur" in event]
    found = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if not found:
        threads: dict[object, list[dict]] = {}
        for event in events:
            if event.get("cat") == "cpu_op":
                threads.setdefault(event["tid"], []).append(event)
        found = _outermost(max(threads.values(), key=len) if threads else [])
    return [Span(event["name"], event["ts"], event["ts"] + event["dur"]) for event in found]


def _outermost(events: list[dict]) -> list[dict]:
    found: list[dict] = []
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        if not found or event["ts"] >= found[-1]["ts"] + found[-1]["dur"]:
            found.append(event)
    return found


def shares(spans: Iterable[Span]) -> dict:
    """Of the second half of the time from the first of the spans to the last, in percent: when a kernel ran, when only
    a copy did, when nothing did; and which kernels took the most."""
    spans = sorted(spans, key=lambda span: span.start)
    if not spans:
        return {"seconds": 0.0}
    first, last = spans[0].start, max(span.stop for span in spans)
    middle = (first + last) / 2
    late = [Span(span.name, max(span.start, middle), span.stop) for span in spans if span.stop > middle]
    whole = last - middle
    kernels = _covered(span for span in late if not span.is_copy)
    busy = _covered(late)
    by_name: dict[str, float] = {}
    for span in late:
        by_name[span.name] = by_name.get(span.name, 0.0) + span.stop - span.start
    most = sorted(by_name.items(), key=lambda item: -item[1])[:MOST]
    return {
        "seconds": whole / 1e6,
        "kernels": 100 * kernels / whole,
        "copies alone": 100 * (busy - kernels) / whole,
        "gaps": 100 * (1 - busy / whole),
        "most": {name: 100 * time / whole for name, time in most},
    }


def _covered(spans: Iterable[Span]) -> float:
    """The time in which at least one of the spans, sorted by their start, lasts."""
    total, end = 0.0, float("-inf")
    for span in spans:
        total += max(0.0, span.stop - max(span.start, end))
        end = max(end, span.stop)
    return total


if __name__ == "__main__":
    run_process(main)
