"""Train a student from a teacher's cached or online logits, or plainly.

  torchrun --nproc_per_node=8 -m ckd_dist.distill --data.train train.beton --data.val holdout.beton \\
      --model.name resnet18 --teacher.store stores/teacher --teacher.checkpoints [20] --run_dir runs/student

--teacher.checkpoints [20,40] distills from the ensemble of both; with --teacher.combine sequence, first from one, then
from the other. --teacher.run runs/teacher, instead of --teacher.store, runs the teacher at every step. Neither of them:
the plain student, for the baseline. The same command again goes on from the last saved step.
"""

from ckd_dist.core.process import run_command
from ckd_dist.train.options import DistillConfig


def main(config: DistillConfig) -> None:
    """Train a student."""
    # Imported here because torch takes seconds: only once the options are known to be good.
    from ckd_dist.core import dist
    from ckd_dist.data.beton import open_images
    from ckd_dist.train import students

    with dist.process_group() as device:
        students.train([config], open_images(config.data, "train", "val"), device)


if __name__ == "__main__":
    run_command(main, DistillConfig, "ckd_dist.distill")
