"""What runs leave for those who compare them: results.csv, a line for each student of a search, and what the JSON files
of trainings, selections and benchmarks must hold."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from ckd_dist.core.errors import UserError, require
from ckd_dist.core.files import parse_json, read_json, require_regular, schema, write_bytes_atomically
from ckd_dist.core.options import Scaling

_FINITE = {"allow_inf_nan": False}
"""For pydantic: what is not a number, or not finite, is damage."""


# ------------------------------------------------------------------------------------------- results.csv


@dataclass
class Row:
    """A line of results.csv; top-1 and top-5 in percent."""

    student: str
    model: str
    teacher: str
    loss: str | None
    alpha: float | None
    temperature: float | None
    seed: int
    epochs: int
    val_top1: float
    val_top5: float
    val_loss: float
    train_seconds: float
    """Of all the students that were trained side by side."""
    side_by_side: int
    chosen: int
    """1 for students of their teacher's best setting; only these have test figures."""
    test_top1: float | None
    test_top5: float | None
    test_loss: float | None
    weights_sha256: str | None = None
    """Of the teacher's checkpoints, joined by +."""
    identity: str | None = None
    """Of the student, see `identity.Origin`."""

    __pydantic_config__ = _FINITE


COLUMNS = tuple(field.name for field in fields(Row))
SINCE_OLDER = ("weights_sha256", "identity")
"""Columns that tables of older versions lack: none of them, the second, or both."""


def write_table(path: Path, rows: list[dict]) -> None:
    """Write results.csv, atomically; a figure that a row lacks is left empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes_atomically(path, text.getvalue().encode())


def read_table(path: Path, option: str) -> list[dict]:
    """The fields of `Row` of every line of results.csv, None for what is empty; raises `UserError` where it is no such
    table."""
    import pydantic  # takes a fifth of a second

    require_regular(path, option)
    mend = "remove it, and the same search writes it anew"
    try:
        with open(path, newline="", encoding="utf-8") as file:
            head, *lines = list(csv.reader(file)) or [[]]
    except (ValueError, csv.Error) as error:
        raise UserError(f"{option}: {path} is damaged ({error}): {mend}") from None
    require(
        tuple(head) in (COLUMNS, COLUMNS[:-1], COLUMNS[:-2]),
        f"{option}: {path} is not a table of this version: its columns are {', '.join(head)}: {mend}",
    )
    uneven = [number for number, line in enumerate(lines, start=2) if len(line) != len(head)]
    require(not uneven, f"{option}: {path} is damaged (line {uneven[:1]} has not a cell a column): {mend}")
    cells = [{key: cell or None for key, cell in zip(head, line, strict=True)} for line in lines]
    try:
        return [vars(row) for row in schema(list[Row]).validate_python(cells)]
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        number, column = first["loc"][:2]
        where = f"{column} of student {int(number) + 1}"
        raise UserError(f"{option}: {path} is damaged ({where}: {first['msg']}): {mend}") from None


def grouped(rows: Sequence[dict], *keys: str) -> list[tuple[tuple, list[dict]]]:
    """Rows with equal values of `keys`, in the order in which each group first appears."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return list(groups.items())


def mean_and_deviation(values: Sequence[float], sign: str = "") -> str:
    """As text, two digits; `sign` + shows that of positive means too. One value has no deviation."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.2f}{deviation}"


# ------------------------------------------------------------------------------------------- selections


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What a selection found out about one checkpoint: information in nats, deviations over its probes, top-1 and
    agreement in percent."""

    epoch: int
    weights_sha256: str
    image_information: float
    image_information_deviation: float | None
    label_information: float
    label_information_deviation: float | None
    scores: dict[Scaling, float]
    top1: float
    entropy: float
    calibration_error: float
    conditional_mutual_information: float
    agreement_with_last: float
    calibrated_loss: float | None = None
    """Cross entropy in nats at the temperature that suits the checkpoint best; files of older versions have none."""

    __pydantic_config__ = _FINITE


@dataclass(frozen=True)
class FixedChoices:
    """Epochs that are chosen without a look at the checkpoints."""

    half: int
    full: int


@dataclass(frozen=True, kw_only=True)
class Selection:
    """selection.json."""

    format: Literal[1]
    choice: int
    """Epoch of the chosen checkpoint."""
    weights_sha256: str
    """Of the chosen checkpoint."""
    scaling: Scaling
    """By which it is chosen."""
    weight: float
    """Of I(Y;F)."""
    choices: dict[Scaling, int]
    """What each scaling would choose."""
    fixed: FixedChoices
    layer: str
    """Module whose output is F."""
    layer_form: str = ""
    """What F is: its channels and positions, and which tokens are left out; empty in a file of an older version."""
    seed: int
    probe: dict[str, float]
    constants: dict[str, float]
    checkpoints: list[Candidate]
    """In the order of training."""

    __pydantic_config__ = _FINITE

    def __post_init__(self) -> None:
        chosen = [each.weights_sha256 for each in self.checkpoints if each.epoch == self.choice]
        require(chosen == [self.weights_sha256], "the choice is not one of the checkpoints")
        scored = all(self.scaling in each.scores for each in self.checkpoints)
        require(scored, f"a checkpoint has no {self.scaling} score")


@dataclass(frozen=True)
class Cost:
    """cost.json."""

    seconds: float
    """Of the selection."""
    student_seconds: float
    """Of training one student."""
    share: float
    """Of training a student from each checkpoint that the selection takes."""

    __pydantic_config__ = _FINITE


def write_json(path: Path, values: Selection | Cost) -> None:
    """Write selection.json or cost.json, atomically."""
    write_bytes_atomically(path, (json.dumps(asdict(values), indent=2) + "\n").encode())


def read_selection(path: Path, option: str) -> Selection:
    """selection.json; raises `UserError` where it is damaged."""
    return read_json(path, Selection, option, "remove it, and run ckd_dist.select_teacher again")


@dataclass(frozen=True)
class RaceDrop:
    """A candidate that a race dropped, by its number."""

    candidate: int
    epochs: int
    """Of its students."""
    seeds: int
    behind: float | None
    """The leader's share of right answers less its own; None of one that was not begun."""
    tested: bool
    """Whether by the test, else for want of budget."""
    cost: float
    """Of the race by then, in students of the full length."""

    __pydantic_config__ = _FINITE


@dataclass(frozen=True)
class Race:
    """What is read of race.json."""

    format: Literal[1]
    choice: dict[str, str]
    """Checkpoints that teach together, as users call them -> sha256 of their weights."""
    candidates: list[str]
    """Each in words."""
    leader: int
    standing: list[int]
    """Those that were not told apart from the leader, which is the first."""
    drops: list[RaceDrop]
    cost: float
    verdict: list[str]
    """In words."""

    __pydantic_config__ = _FINITE

    def __post_init__(self) -> None:
        numbers = [self.leader, *self.standing, *(drop.candidate for drop in self.drops)]
        require(all(0 <= each < len(self.candidates) for each in numbers), "a number is of no candidate")


def read_race(path: Path, option: str) -> Race:
    """race.json; raises `UserError` where it is damaged."""
    return read_json(path, Race, option, "remove it, and run the race again")


def read_choice(path: str, option: str) -> dict[str, str]:
    """Checkpoint, as users call it -> sha256 of its weights, of the one that a selection.json chooses, or of those that
    a race.json does; `path` is such a file, or the folder with one."""
    folder = Path(path)
    require(folder.exists(), f"{option}: no such file: {path} (write it with ckd_dist.select_teacher)")
    inside = [each for each in (folder / "selection.json", folder / "race.json") if each.exists()]
    file = inside[0] if inside else folder
    require(file.is_file(), f"{option}: {path} holds no selection.json of select_teacher and no race.json of search")
    if file.name != "race.json":
        found = read_selection(file, option)
        return {str(found.choice): found.weights_sha256}
    return read_race(file, option).choice


def read_cost(path: Path, option: str) -> Cost:
    """cost.json; raises `UserError` where it is damaged."""
    return read_json(path, Cost, option, "remove it and selection.json, and run ckd_dist.select_teacher again")


# ------------------------------------------------------------------------------------------- what the report reads


@dataclass(frozen=True)
class Spread:
    """Of a rate: greater than 0."""

    median: float
    min: float
    max: float

    __pydantic_config__ = _FINITE

    def __post_init__(self) -> None:
        require(0 < self.min <= self.median <= self.max, "not a rate's least, median and most")

    @property
    def words(self) -> str:
        """The three of them."""
        return f"{self.median:.2f} ({self.min:.2f} to {self.max:.2f})"


@dataclass(frozen=True)
class Measurement:
    """A row of bench.json."""

    case: str
    what: str
    unit: str
    rate: Spread
    reference: str | None
    ratio: Spread | None
    """To the reference, in the same rounds; above 1: faster."""
    limit: str
    """What it is held by."""


@dataclass(frozen=True)
class Machine:
    """What the report reads of where it was measured."""

    device: str
    cores: int
    threads: int
    python: str
    versions: dict[str, str | None]


@dataclass(frozen=True)
class Bench:
    """What the report reads of bench.json."""

    environment: Machine
    precision: str
    machine: dict[str, float]
    """Its limits: copied_bytes_per_s, flop_per_s."""
    rows: list[Measurement]


def read_bench(path: Path, option: str) -> Bench:
    """bench.json; raises `UserError` where it is damaged."""
    return read_json(path, Bench, option, "remove it, or run ckd_dist.bench again")


@dataclass(frozen=True)
class Metric:
    """What the report reads of a line of metrics.jsonl."""

    split: str
    top1: float | None = None
    """None of training images without labels."""

    __pydantic_config__ = _FINITE


def read_curve(path: Path, option: str) -> list[float]:
    """Top-1 on held-out images after every epoch, of metrics.jsonl; raises `UserError` where it is damaged."""
    require_regular(path, option)
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            metric = parse_json(line, Metric)
            if metric.split == "val":
                if metric.top1 is None:
                    raise ValueError("no top1")
                found.append(metric.top1)
        except ValueError as error:
            raise UserError(
                f"{option}: line {number} of {path} is damaged ({error}): remove the file to go without this curve"
            ) from None
    return found
