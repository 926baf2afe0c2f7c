"""Compute the logits of a teacher's checkpoints once, for every image and view, on the images that students will see.

  torchrun --nproc_per_node=8 -m ckd_dist.cache_logits --data.train train.beton --teacher.run runs/teacher \\
      --store stores/teacher --views 16 --data.batch_size 256

`python -m ckd_dist.store plan`, with the same options, tells beforehand what it takes. Each image is decoded once for
all checkpoints. The same command again goes on with the first missing shard; on CPUs the finished store is the same,
byte for byte, however often it was interrupted and whatever the number of processes; on GPUs it may differ in the last
digits of the logits.
"""

from pathlib import Path

from ckd_dist.core.process import run_command
from ckd_dist.store.options import CacheConfig


def main(config: CacheConfig) -> None:
    """Write what the store lacks."""
    # Imported here because torch takes seconds: only once the options are known to be good.
    from ckd_dist.core import console, dist, precision
    from ckd_dist.store import recording
    from ckd_dist.store.creation import create_or_extend
    from ckd_dist.store.describe import describe

    with dist.process_group() as device:
        wanted, recorder = describe(config, device)
        store, names = Path(config.store), list(wanted.checkpoints)

        def create_and_list():
            manifest = create_or_extend(store, wanted)
            return manifest, recording.missing_work(store, manifest, names, config.views, config.teachers_at_once)

        recorder.manifest, work = dist.on_main(create_and_list)
        if note := recorder.manifest.decoding_note(wanted.images):
            console.say(note)
        count = recorder.manifest.dataset["count"]
        records = sum(recording.count_records(ranges) for _, ranges in work)
        all_records = count * config.views * len(names)
        console.say(
            f"{store}: {len(names)} checkpoints x {config.views} views x {count} images; "
            f"{all_records - records} of {all_records} records are there already; forward pass in "
            f"{precision.words(recorder.manifest.forward['amp'])}"
        )
        if work:
            recording.write_work(store, recorder, work)


if __name__ == "__main__":
    run_command(main, CacheConfig, "ckd_dist.cache_logits")
