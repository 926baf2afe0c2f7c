"""Evaluate a checkpoint: each image is counted once, whatever the number of processes.

  torchrun --nproc_per_node=8 -m ckd_dist.evaluate --data.val test.beton \\
      --checkpoint runs/teacher/checkpoints/epoch_0040.pt

Prints one JSON object: top1 and top5 in percent, the mean loss in nats, the number of images, the precision, and by
their hashes what images and weights these are.
"""

import json

from ckd_dist.core.process import run_command
from ckd_dist.train.options import EvaluateConfig


def main(config: EvaluateConfig) -> None:
    """Print what a checkpoint reaches."""
    # Imported here because torch takes seconds: only once the options are known to be good.
    from ckd_dist.core import checkpoint, console, dist, precision
    from ckd_dist.data import classes
    from ckd_dist.data.beton import open_beton
    from ckd_dist.data.loader import BetonLoader
    from ckd_dist.nn import forward, models, probe
    from ckd_dist.train import evaluation

    with dist.process_group() as device:
        model, metadata = models.load_model(config.checkpoint, "checkpoint", config.model)
        info = open_beton(config.data.val, "data.val", verify=config.data.verify)
        classes.require_labels(info, "data.val")
        info = classes.match_model(info, "data.val", metadata, config.checkpoint, config.data.map_classes)
        loader = BetonLoader.for_evaluation(info, config.data, metadata, device)
        probe.require_fits(model, metadata["model"], info.num_classes, loader.image_size, "data.image_size")
        amp = precision.resolve_amp(config.amp)
        network = {config.checkpoint: forward.to_device(model, device)}
        (result,) = evaluation.evaluate(network, loader, amp, config.mirror).values()
        made_of = {"content_hash": info.content_hash, "weights_sha256": checkpoint.weights_sha256(model.state_dict())}
        console.say(json.dumps({**result, "images": info.count, "amp": amp, **made_of}))


if __name__ == "__main__":
    run_command(main, EvaluateConfig, "ckd_dist.evaluate")
