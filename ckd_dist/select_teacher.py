"""Choose the checkpoint that teaches best by mutual information: Algorithm 1 of the paper.

  torchrun --nproc_per_node=8 -m ckd_dist.select_teacher --data.train train.beton --data.val holdout.beton \\
      --teacher.run runs/teacher --run_dir runs/selection

For every checkpoint, frozen, a decoder and a classifier are trained on its features F and scored on held-out images:
I(X;F) and I(Y;F), see ckd_dist.selection.mi. The checkpoint with the largest I(X;F) + weight * I(Y;F) is chosen. Each
image is decoded once for all checkpoints. selection.json holds the estimates, the choice under every scaling, and
what to compare it with: the half-way and the last checkpoint, and scores of the logits alone. `distill
--teacher.selection runs/selection` takes it.
"""

from __future__ import annotations

import time
from pathlib import Path

from ckd_dist.core import results
from ckd_dist.core.options import to_dict
from ckd_dist.core.process import run_command
from ckd_dist.selection.options import SelectConfig


def main(config: SelectConfig) -> None:
    """Estimate, choose, and show both."""
    # Imported here because torch takes seconds: only once the options are known to be good.
    from ckd_dist.core import console, dist, identity, precision
    from ckd_dist.core.run_folder import RunFolder
    from ckd_dist.data import classes
    from ckd_dist.data.beton import open_images
    from ckd_dist.selection import choice, probes

    with dist.process_group() as device:
        images = open_images(config.data, "train", "val")
        classes.require_labels(images["data.train"], "data.train", "I(Y;F) is what features tell of them")
        folder, requested = Path(config.run_dir), config
        config = precision.resolve(requested, folder)
        trajectory = probes.load_trajectory(config, device)
        teacher, how = config.teacher.run, config.data.map_classes
        images = {
            option: classes.match_model(info, option, trajectory.metadata, teacher, how)
            for option, info in images.items()
        }
        inputs = {option: info.as_input() for option, info in images.items()}
        inputs["teacher.run"] = identity.run(teacher, trajectory.weights_sha256)
        origin = identity.Origin(requested=to_dict(requested), resolved=to_dict(config), inputs=inputs)
        if RunFolder(config.run_dir, origin).complete:
            console.say(f"{folder}: complete already")
            result = dist.on_main(lambda: results.read_selection(folder / "selection.json", "run_dir"))
            cost = dist.on_main(lambda: results.read_cost(folder / "cost.json", "run_dir"))
            if dist.rank() == 0:
                show(config, result, cost)
            return
        info, held_out = images["data.train"], images["data.val"]
        console.say(
            f"{config.run_dir}: {len(trajectory.models)} checkpoints of {config.teacher.run}, F is the output of "
            f"{trajectory.layer.words}; {config.probe.repeats} probes each, {config.probe.steps} steps, "
            f"in {precision.words(config.amp)}"
        )
        training = probes.ProbeTraining(config, trajectory, info)
        training.run()
        started = time.perf_counter()
        found, constants = choice.estimate(config, trajectory, training.probes, training.mean_colour, held_out)
        seconds = training.seconds + time.perf_counter() - started
        result = choice.decide(config, trajectory, found, constants)
        student = choice.student_seconds(config, trajectory, info)
        cost = results.Cost(seconds, student, share=seconds / (student * len(trajectory.models)))
        if dist.rank() == 0:
            results.write_json(folder / "cost.json", cost)
            results.write_json(folder / "selection.json", result)
            training.discard()
            show(config, result, cost)


def show(config: SelectConfig, result: results.Selection, cost: results.Cost) -> None:
    """Print the estimates and the choice."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in (
        "epoch",
        "I(X;F), nats a pixel",
        "I(Y;F), nats",
        "score",
        "top-1 %",
        "calibrated loss",
        "calibration error",
        "entropy",
        "CMI",
    ):
        table.add_column(column, justify="right")
    for each in result.checkpoints:
        cells = []
        for value, deviation in (
            (each.image_information, each.image_information_deviation),
            (each.label_information, each.label_information_deviation),
        ):
            cells.append(f"{value:.4f}" + (f" ± {deviation:.4f}" if deviation is not None else ""))
        chosen = each.epoch == result.choice
        table.add_row(
            f"{each.epoch}{' *' if chosen else ''}",
            *cells,
            f"{each.scores[config.scaling]:.3f}",
            f"{each.top1:.2f}",
            f"{each.calibrated_loss:.4f}",
            f"{each.calibration_error:.4f}",
            f"{each.entropy:.4f}",
            f"{each.conditional_mutual_information:.4f}",
            style="bold" if chosen else None,
        )
    console = Console(highlight=False, width=120)
    console.print(table)
    others = ", ".join(f"{scaling}: epoch {epoch}" for scaling, epoch in result.choices.items())
    count = len(result.checkpoints)
    console.print(
        f"Chosen: epoch {result.choice} ({others}). It took {cost.seconds:.0f} s, {100 * cost.share:.1f} % of "
        f"the {cost.student_seconds * count:.0f} s that training {config.student} from each of {count} checkpoints "
        f"for {config.student_epochs} epochs would take."
    )


if __name__ == "__main__":
    run_command(main, SelectConfig, "ckd_dist.select_teacher")
