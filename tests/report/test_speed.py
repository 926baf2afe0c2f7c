"""Tables of what was measured, of rows that are known."""

from __future__ import annotations

import pytest

from ckd_dist.core.errors import UserError
from ckd_dist.core.results import Bench, Machine, Measurement, Spread
from ckd_dist.report import speed

MACHINE = Machine("Some CPU", 2, 1, "3.11", {"torch": "2.15", "ffcv": None})


def row(case: str, what: str, rate: float, reference: str | None = None, ratio: float | None = None) -> Measurement:
    spread = None if ratio is None else Spread(ratio, ratio / 2, ratio * 2)
    return Measurement(case, what, "images/s", Spread(rate, rate, rate), reference, spread, "disk")


def bench(*rows: Measurement) -> Bench:
    return Bench(MACHINE, "bfloat16", {"copied_bytes_per_s": 33e9, "flop_per_s": 0.42e12}, list(rows))


def test_rows_stand_under_their_cases():
    found = speed.every(bench(row("one", "a", 1234.5), row("one", "b", 0.1234, "a", 2.0), row("two", "c", 20)))
    assert found.rows == [
        ["**one**", "", "", "", ""],
        ["a", "1,234 images/s", "", "", "disk"],
        ["b", "0.12 images/s", "2.00 (1.00 to 4.00)", "a", "disk"],
        ["**two**", "", "", "", ""],
        ["c", "20 images/s", "", "", "disk"],
    ]
    assert found.text.startswith("Some CPU, 2 cores, 1 threads; copies 33 GB/s, multiplies 0.42 Tflop/s in bfloat16")
    assert "torch 2.15" in found.text and "ffcv" not in found.text


def test_what_is_said_in_short_is_found_among_the_rows():
    wanted = speed.IN_SHORT.values()
    rows = [row(f"{case}of a kind", what, 1, "other", n + 1.0) for n, (case, what) in enumerate(wanted)]
    found = speed.in_short(bench(*rows[::-1]))
    assert [line[0] for line in found.rows] == list(speed.IN_SHORT)
    assert [float(line[1].split()[0]) for line in found.rows] == [n + 1.0 for n in range(len(wanted))]
    with pytest.raises(UserError, match=r"'side by side' of '4 students' was not measured"):
        speed.in_short(bench(*(each for each in rows if each.what != "side by side")))
