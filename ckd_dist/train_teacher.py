"""Train a teacher and keep its trajectory of checkpoints.

  torchrun --nproc_per_node=8 -m ckd_dist.train_teacher --data.train train.beton --data.val holdout.beton \\
      --model.name resnet50 --epochs 40 --data.batch_size 1024 --optim.lr 0.5 --run_dir runs/teacher

The same command again goes on from the last saved step.
"""

from ckd_dist.core.process import run_command
from ckd_dist.train.options import TrainTeacherConfig

# Students use views 0, 1, 2, ...: the teacher must not have been fitted to the very images that it is asked about.
FIRST_VIEW = 1 << 20


def main(config: TrainTeacherConfig) -> None:
    """Train a teacher."""
    # Imported here because torch takes seconds: only once the options are known to be good.
    from ckd_dist.core import dist, precision
    from ckd_dist.data import classes, dataset
    from ckd_dist.data.beton import open_images
    from ckd_dist.train import setup
    from ckd_dist.train.objective import LabelLoss
    from ckd_dist.train.schedule import EpochSchedule

    with dist.process_group() as device:
        images = open_images(config.data, "train", "val")
        classes.require_labels(images["data.train"], "data.train", "a teacher learns from nothing else")
        resolved, images = setup.as_pretrained(precision.resolve(config, config.run_dir), images)
        loss = LabelLoss(config)
        kept = config.optim.cycles if config.optim.cycles > 1 else 10
        setup.train(
            [setup.Run(resolved, setup.origin(config, resolved, images, {}), loss)],
            images,
            device=device,
            recipe=dataset.train_recipe(config.data, images["data.train"]),
            view_seed=config.data.view_seed or 0,
            schedule=EpochSchedule(
                config.data.views or config.epochs, first_view=FIRST_VIEW, repeats=config.data.repeats
            ),
            save_every=config.save_every or max(1, config.epochs // kept),
        )


if __name__ == "__main__":
    run_command(main, TrainTeacherConfig, "ckd_dist.train_teacher")
