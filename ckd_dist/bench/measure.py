"""Rates measured in turn, as rows of a table; and the limits of the machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch


@dataclass
class Row:
    """One thing measured: its rates, and their ratios to those of a reference in the same rounds."""

    case: str
    what: str
    unit: str
    rates: list[float]
    reference: str | None = None
    ratios: list[float] = field(default_factory=list)
    """Above 1: faster than the reference."""
    limit: str = ""
    """What it is held by, and how near it comes."""

    @property
    def rate(self) -> float:
        """The median."""
        return statistics.median(self.rates)

    def to_dict(self) -> dict:
        """As bench.json has it."""
        ratio = spread(self.ratios) if self.ratios else None
        return {
            "case": self.case,
            "what": self.what,
            "unit": self.unit,
            "rate": spread(self.rates),
            "reference": self.reference,
            "ratio": ratio,
            "limit": self.limit,
        }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def synchronize() -> None:
    """Wait until the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_turn(
    case: str,
    unit: str,
    works: Mapping[str, Callable[[], float]],
    *,
    rounds: int,
    warm_up: int = 1,
    references: dict[str, str] | None = None,
    limits: dict[str, str] | None = None,
) -> list[Row]:
    """Do all `works` one after another, forwards and backwards in turn, `rounds` times, after some that do not count. A
    work returns how much it did, in units; a row has its rate and the ratio to its reference's in the same round: by
    default, the first work's."""
    rates: dict[str, list[float]] = {name: [] for name in works}
    for number in range(-warm_up, rounds):
        for name in list(works)[:: -1 if number % 2 else 1]:
            synchronize()
            started = time.perf_counter()
            done = works[name]()
            synchronize()
            if number >= 0:
                rates[name].append(done / (time.perf_counter() - started))
    rows = []
    for name in works:
        reference = (references or {}).get(name, next(iter(works)))
        row = Row(case, name, unit, rates[name], limit=(limits or {}).get(name, ""))
        if reference != name:
            row.reference = reference
            row.ratios = [a / b for a, b in zip(rates[name], rates[reference], strict=True)]
        rows.append(row)
    return rows


def machine_limits(device: torch.device, amp: str) -> dict[str, float]:
    """What the machine does at most: bytes/s of copying memory, read and write together, and operations/s of a matrix
    product in the type of `amp`, on `device` with the threads of this process."""
    on_gpu = device.type == "cuda"
    source = torch.ones((1 << 30) if on_gpu else (1 << 28), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    side = 8192 if on_gpu else 2048
    matrix = torch.randn(side, side, device=device, dtype=getattr(torch, amp, torch.float32))

    def copy() -> float:
        target.copy_(source)
        return 2 * source.numel()

    def product() -> float:
        torch.mm(matrix, matrix)
        return 2 * side**3

    copied, multiplied = in_turn("machine", "1/s", {"copy": copy, "product": product}, rounds=9, warm_up=3)
    return {"copied_bytes_per_s": max(copied.rates), "flop_per_s": max(multiplied.rates)}
