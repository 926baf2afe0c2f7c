"""What bench.json says, as tables."""

from __future__ import annotations

from ckd_dist.core.console import format_rate
from ckd_dist.core.errors import require
from ckd_dist.core.results import Bench, Measurement
from ckd_dist.report.evidence import Table

IN_SHORT = {
    "an epoch from the store against plain training": ("epoch, ", "from the store, dense"),
    "an epoch with a ResNet-56 as an online teacher against one from the store": (
        "epoch, ",
        "online teacher, resnet56",
    ),
    "the loader against FFCV's stock decoder, JPEG": ("loader, JPEG", "ckd_dist"),
    "the loader with RandAugment against itself without, JPEG": ("loader, JPEG", "ckd_dist, RandAugment"),
    "a file larger than memory, quasi-random against random order": ("file of ", "quasi_random order"),
    "four checkpoints cached on one decoding against four passes": (
        "caching, resnet18",
        "caching 4 checkpoints, one pass",
    ),
    "four students side by side against four commands": ("4 students", "side by side"),
    "a store four times larger than memory, views read ahead against row by row": (
        "cold store",
        "random order, views read ahead",
    ),
}
"""What is said -> which row says it: the beginning of its case, and what was measured."""


def cells(row: Measurement) -> list[str]:
    """The rate, the ratio, to what, and the limit."""
    return [
        f"{format_rate(row.rate.median)} {row.unit}",
        row.ratio.words if row.ratio else "",
        row.reference or "",
        row.limit,
    ]


def machine(bench: Bench) -> str:
    """Where it was measured, and what that reaches."""
    of, limits = bench.environment, bench.machine
    versions = ", ".join(f"{name} {version}" for name, version in of.versions.items() if version)
    return (
        f"{of.device}, {of.cores} cores, {of.threads} threads; copies {limits['copied_bytes_per_s'] / 1e9:,.0f} GB/s, "
        f"multiplies {limits['flop_per_s'] / 1e12:,.2f} Tflop/s in {bench.precision}; Python {of.python}, {versions}"
    )


def every(bench: Bench) -> Table:
    """All rows, under their cases."""
    rows: list[list[str]] = []
    case = None
    for row in bench.rows:
        if row.case != case:
            case = row.case
            rows.append([f"**{case}**", "", "", "", ""])
        rows.append([row.what, *cells(row)])
    text = f"{machine(bench)}. Medians, ratios with least and most, of rates in the same round: above 1 is faster."
    return Table("What this machine reaches", text, ["", "rate", "ratio", "to", "held by"], rows)


def in_short(bench: Bench) -> Table:
    """Ratios alone, of what matters most; raises `UserError` where a row was not measured."""
    rows = []
    for said, (case, what) in IN_SHORT.items():
        found = [row.ratio for row in bench.rows if row.case.startswith(case) and row.what == what and row.ratio]
        require(bool(found), f"bench.json: {what!r} of {case!r} was not measured: run ckd_dist.bench with all cases")
        rows.append([said, found[0].words])
    of = bench.environment
    text = f"Rates compared in turn on {of.cores} cores of an {of.device}: median, least and most; above 1 is faster."
    return Table("How fast", text, ["", "ratio of rates"], rows)
