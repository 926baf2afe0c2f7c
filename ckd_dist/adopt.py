"""Take checkpoints of another program's training as a run, which every other command takes as a teacher's.

  python -m ckd_dist.adopt --files [resnet50_20.pth,resnet50_40.pth] --epochs [20,40] --model.name resnet50 \\
      --data.val holdout.beton --run_dir runs/adopted

Reads what torchvision's references, timm, Lightning, FSDP and others save, and safetensors; executes nothing of a file.
Each checkpoint is measured on the held-out images: what it reaches shows whether network, normalisation and classes are
those of its training. The same command again finds the run complete.
"""

from ckd_dist.core.process import run_command
from ckd_dist.train.options import AdoptConfig


def main(config: AdoptConfig) -> None:
    """Make the run."""
    # Imported here because torch takes seconds: only once the options are known to be good.
    from ckd_dist.core import dist
    from ckd_dist.train import adoption

    with dist.process_group() as device:
        adoption.adopt(config, device)


if __name__ == "__main__":
    run_command(main, AdoptConfig, "ckd_dist.adopt")
