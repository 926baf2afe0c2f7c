"""The pictures of the report."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ckd_dist.core.results import Bench, Race, Selection
from ckd_dist.report.findings import StudentGroup, Study, WayToChoose, chosen_epochs
from ckd_dist.selection.mi import SCALINGS

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072b2", "#d55e00", "#009e73", "#8d5a99", "#777777"


def plain_axes(
    columns: int = 1, rows: int = 1, width: float = 8.0, height: float = 4.2, **more: Any
) -> tuple[Figure, Any]:
    """A figure that belongs to no window, with plain axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **more)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(True, color="#e6e6e6", linewidth=0.8)
        ax.set_axisbelow(True)
    return figure, axes


def spread(values: Sequence[float]) -> float:
    """Standard deviation; 0 for one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def checkpoints(
    each: list[StudentGroup], singles: list[StudentGroup], selection: Selection | None, split: str
) -> Figure:
    """Students' top-1 against the epoch of their teacher, and below it the teacher's own."""
    figure, axes = plain_axes(
        rows=2 if selection else 1,
        height=5.6 if selection else 4.2,
        sharex=True,
        height_ratios=[3, 2][: 2 if selection else 1],
    )
    ax = axes[0, 0]
    epochs = [one.epoch or 0 for one in singles]
    means, spreads = [one.mean for one in singles], [spread(one.top1) for one in singles]
    ax.errorbar(
        epochs, means, spreads, color=BLUE, marker="o", capsize=3, label=f"student, n = {len(singles[0].top1)} seeds"
    )
    if plain := _plain(each):
        ax.axhline(plain.mean, color=GREY, linestyle="--", label="student without a teacher")
        low, high = plain.mean - spread(plain.top1), plain.mean + spread(plain.top1)
        ax.axhspan(low, high, color=GREY, alpha=0.12, linewidth=0)
    ax.set_ylabel(f"student's {split} top-1, %")
    if selection:
        label = f"chosen by I(X;F) + I(Y;F), {selection.scaling}"
        for one in singles:
            if one.weights_sha256 == selection.weights_sha256:
                ax.plot(one.epoch, one.mean, "*", color=ORANGE, markersize=18, zorder=5, label=label)
        below = axes[1, 0]
        rows = selection.checkpoints
        below.plot([row.epoch for row in rows], [row.top1 for row in rows], color=GREEN, marker="s")
        below.set_ylabel("teacher's own top-1,\nheld out, %")
    axes[-1, 0].set_xticks(epochs)
    axes[-1, 0].set_xlabel("epoch of the teacher's checkpoint")
    ax.legend(frameon=False, fontsize=9)
    return figure


def _plain(each: Sequence[StudentGroup]) -> StudentGroup | None:
    return next((one for one in each if one.teacher == "none"), None)


def ensembles(base: StudentGroup, ensembles: list[StudentGroup], split: str) -> Figure:
    """Students' top-1 against the number of checkpoints in the ensemble: of one run, and of several."""
    figure, axes = plain_axes()
    ax = axes[0, 0]
    kinds: dict[str, tuple[str, Callable[[str], bool]]] = {
        "snapshot: checkpoints of one run": (BLUE, lambda teacher: "/" not in teacher),
        "full: last checkpoints of several runs": (ORANGE, lambda teacher: "/" in teacher),
    }
    for shift, (label, (color, belongs)) in zip((-0.03, 0.03), kinds.items(), strict=True):
        line = [
            base,
            *sorted((one for one in ensembles if belongs(one.teacher)), key=lambda one: one.size),
        ]
        if len(line) > 1:
            sizes = [one.size + shift for one in line]
            ax.errorbar(
                sizes,
                [o.mean for o in line],
                [spread(o.top1) for o in line],
                color=color,
                marker="o",
                capsize=3,
                label=label,
            )
            for size, one in list(zip(sizes, line, strict=True))[1:]:
                ax.annotate(
                    one.teacher, (size, one.mean), textcoords="offset points", xytext=(6, 6), fontsize=8, color=color
                )
    ax.set_xticks(sorted({one.size for one in [base, *ensembles]}))
    ax.set_xlabel("checkpoints in the ensemble")
    ax.set_ylabel(f"student's {split} top-1, %")
    ax.margins(x=0.15)
    ax.legend(frameon=False, fontsize=9)
    return figure


def information(selections: list[Selection]) -> Figure:
    """I(Y;F) against I(X;F), the checkpoints joined in the order of training, the chosen one a star; a panel for each
    selection."""
    count = len(selections)
    figure, axes = plain_axes(columns=count, width=max(6.0, 4.6 * count), height=4.4)
    for ax, selection in zip(axes[0], selections, strict=True):
        rows = selection.checkpoints
        x, y = [row.image_information for row in rows], [row.label_information for row in rows]
        errors = [row.image_information_deviation or 0.0 for row in rows]
        ax.errorbar(
            x,
            y,
            [row.label_information_deviation or 0.0 for row in rows],
            errors,
            color=BLUE,
            marker="o",
            linewidth=1,
            elinewidth=0.8,
            capsize=2,
        )
        for row in rows:
            place = (row.image_information, row.label_information)
            ax.annotate(str(row.epoch), place, textcoords="offset points", xytext=(5, 5), fontsize=8)
            if row.epoch == selection.choice:
                ax.plot(*place, "*", color=ORANGE, markersize=18, zorder=5)
        ax.set_title(f"F: {selection.layer}; {selection.scaling}, weight {selection.weight:g}", fontsize=10)
        ax.set_xlabel("I(X;F), nats a pixel value")
        ax.set_ylabel("I(Y;F), nats")
    return figure


def choice(selections: list[Selection]) -> Figure:
    """The chosen epoch against the weight of I(Y;F), for every scaling; a panel for each selection."""
    weights = np.logspace(-2, 2, 161).tolist()
    count = len(selections)
    figure, axes = plain_axes(columns=count, width=max(6.0, 4.6 * count), height=3.6, sharey=True)
    styles = zip(SCALINGS, (GREY, BLUE, ORANGE), (1.0, 4.5, 2.0), strict=True)
    for scaling, color, width in styles:
        for ax, selection in zip(axes[0], selections, strict=True):
            ax.semilogx(
                weights,
                chosen_epochs(selection, scaling, weights),
                color=color,
                linewidth=width,
                alpha=0.8,
                label=scaling,
            )
    for ax, selection in zip(axes[0], selections, strict=True):
        ax.axvline(selection.weight, color="black", linewidth=0.8, linestyle=":")
        ax.set_title(f"F: {selection.layer}", fontsize=10)
        ax.set_xlabel("weight of I(Y;F)")
        ax.set_yticks([row.epoch for row in selection.checkpoints])
    axes[0, 0].set_ylabel("chosen epoch")
    axes[0, 0].legend(frameon=False, fontsize=9)
    return figure


def regret(ways: Sequence[WayToChoose], singles: list[StudentGroup]) -> Figure:
    """Regret of every way to choose, beside that of a checkpoint drawn at random."""
    best = max(one.mean for one in singles)
    bars = sorted(((way.name, way.regret) for way in ways), key=lambda pair: -pair[1])
    at_random = statistics.mean(best - one.mean for one in singles)
    figure, axes = plain_axes(height=0.32 * len(bars) + 1.2)
    ax = axes[0, 0]
    ax.barh([name for name, _ in bars], [regret for _, regret in bars], color=BLUE, height=0.6)
    ax.axvline(at_random, color=ORANGE, linestyle="--", label="a checkpoint at random, on average")
    noise = statistics.mean(spread(one.top1) for one in singles)
    ax.axvspan(0, noise, color=GREY, alpha=0.15, linewidth=0, label="a student's deviation over seeds")
    ax.set_xlabel("regret, points of top-1")
    figure.legend(frameon=False, fontsize=9, loc="outside upper right", ncols=2)
    return figure


def race(found: Race) -> Figure:
    """How long each candidate was in a race, in what all of it had cost by then, and why it is out."""
    begun = sorted((each for each in found.drops if each.behind is not None), key=lambda d: (d.cost, -(d.behind or 0)))
    not_begun = [each for each in found.drops if each.behind is None][::-1]
    out = {drop.candidate: drop for drop in (*not_begun, *begun)}
    order = [*out, *found.standing[::-1]]
    figure, axes = plain_axes(height=0.3 * len(order) + 1.4, width=9.0)
    ax = axes[0, 0]
    kinds = {
        "behind by more than the noise": GREY,
        "behind, no budget to go on": ORANGE,
        "not told apart from the leader": BLUE,
        "leader": GREEN,
    }
    for place, candidate in enumerate(order):
        drop = out.get(candidate)
        kind = list(kinds)[not drop.tested] if drop else list(kinds)[2 + (candidate == found.leader)]
        length = 0 if drop and drop.behind is None else drop.cost if drop else found.cost
        ax.barh(place, length, color=kinds[kind], height=0.6)
        if drop:
            text = "not begun: its own answers are worse"
            if drop.behind is not None:
                text = f"{100 * drop.behind:.1f} points behind, {drop.seeds} x {drop.epochs} epochs"
            ax.annotate(text, (length, place), textcoords="offset points", xytext=(4, -3), fontsize=7)
    ax.set_yticks(range(len(order)), [found.candidates[candidate] for candidate in order], fontsize=8)
    ax.set_xlabel("cost of the race, in students of the full length")
    ax.margins(x=0.25)
    handles = [Patch(color=color, label=kind) for kind, color in kinds.items()]
    figure.legend(handles=handles, frameon=False, fontsize=8, loc="outside upper right", ncols=2)
    return figure


def curves(study: Study, best_first: list[StudentGroup], base: StudentGroup | None) -> Figure | None:
    """Held-out top-1 after every epoch, the mean over seeds: the best teachers, the last checkpoint, no teacher."""
    wanted = list(dict.fromkeys([*best_first[:3], *(one for one in (base, _plain(best_first)) if one)]))
    figure, axes = plain_axes()
    ax = axes[0, 0]
    drawn = False
    for one, color in zip(wanted, (BLUE, GREEN, PURPLE, ORANGE, GREY), strict=False):
        found = [study.curve(student) for student in one.students]
        if all(found) and len({len(curve) for curve in found}) == 1:
            mean = np.mean(found, axis=0)
            label = "no teacher" if one.teacher == "none" else f"teacher {one.teacher}"
            ax.plot(
                range(1, len(mean) + 1), mean, marker=".", color=GREY if one.teacher == "none" else color, label=label
            )
            drawn = True
    if not drawn:
        return None
    ax.set_xlabel("epoch")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_ylabel("held-out top-1, %")
    ax.legend(frameon=False, fontsize=9)
    return figure


def time(bench: Bench) -> Figure | None:
    """Epoch times over plain training's; None where no epochs were measured."""
    cases = [(row.what, row.ratio) for row in bench.rows[::-1] if row.case.startswith("epoch") and row.ratio]
    if not cases:
        return None
    figure, axes = plain_axes(height=0.5 * len(cases) + 1.2)
    ax = axes[0, 0]
    middle = [1 / ratio.median for _, ratio in cases]
    errors = [[1 / r.median - 1 / r.max for _, r in cases], [1 / r.min - 1 / r.median for _, r in cases]]
    ax.barh([what for what, _ in cases], middle, xerr=errors, color=BLUE, height=0.6, capsize=3)
    ax.axvline(1, color="black", linewidth=0.8)
    ax.set_xlabel("time of an epoch over plain training's")
    return figure
