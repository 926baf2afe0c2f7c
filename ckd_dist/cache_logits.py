"""Compute the logits of a teacher's checkpoints once, for every image and view, on the images that students will see.

  torchrun --nproc_per_node=8 -m ckd_dist.cache_logits --data.train train.beton --teacher.run runs/teacher \\
      --store stores/teacher --views 16 --data.batch_size 256

Each image is decoded once for all checkpoints. The same command again goes on with the first missing shard; the
finished store is the same, byte for byte, however often it was interrupted and whatever the number of processes.
"""

import time
from pathlib import Path

import numpy as np

from ckd_dist.config import CacheConfig, run_command


def main(config: CacheConfig) -> None:
    # Imported here because torch takes seconds: only once the options are known to be good.
    from ckd_dist import checkpoint, data, dist, engine, log, models
    from ckd_dist.store.manifest import Manifest, Shard, member_name
    from ckd_dist.store.writer import ShardWriter, is_written, open_store

    with dist.process_group() as device:
        info = data.read_info(config.data.train, "data.train")
        recipe = data.train_recipe(config.data, info)
        trajectory = checkpoint.trajectory(config.teacher.run, "teacher.run")
        epochs = checkpoint.choose(trajectory, config.teacher.checkpoints or list(trajectory), "teacher.checkpoints")
        teachers, members = {}, {}
        for epoch in sorted(epochs):
            model, metadata = models.load_model(trajectory[epoch], "teacher.run")
            models.require_classes(metadata, info.num_classes, "teacher.run")
            members[member_name(epoch)] = {
                "epoch": epoch,
                "model": metadata["model"],
                "weights_sha256": checkpoint.weights_sha256(model.state_dict()),
            }
            teachers[member_name(epoch)] = engine.to_device(model, device)
        image_size = config.data.image_size or metadata["image_size"]
        wanted = Manifest(
            dataset={
                "name": info.dataset,
                "content_hash": info.content_hash,
                "count": info.count,
                "num_classes": info.num_classes,
            },
            recipe=recipe.to_dict(),
            view_seed=config.seed,
            forward={"image_size": image_size, "mean": metadata["mean"], "std": metadata["std"], "amp": config.amp},
            shard_size=config.shard_size,
            views=config.views,
            checkpoints=members,
        )
        store = Path(config.store)
        manifest = dist.on_main(lambda: open_store(store, wanted))

        def missing() -> list[list[Shard]]:
            """For every view and range of samples, the shards to write: the ranges are what ranks share out."""
            ranges = [
                [shard for shard in shards if not is_written(store, shard)]
                for view in range(config.views)
                for shards in zip(*(manifest.shards(name, view) for name in teachers), strict=True)
            ]
            return [shards for shards in ranges if shards]

        work = dist.on_main(missing)
        records = sum(shard.count for shards in work for shard in shards)
        all_records = info.count * config.views * len(teachers)
        log.say(
            f"{store}: {len(teachers)} checkpoints x {config.views} views x {info.count} images; "
            f"{all_records - records} of {all_records} records are there already"
        )
        if not work:
            return
        loader = data.BetonLoader(
            info,
            config.data,
            recipe,
            batch_size=config.data.batch_size,
            image_size=image_size,
            device=device,
            view_seed=config.seed,
            mean=metadata["mean"],
            std=metadata["std"],
        )
        mine = work[dist.rank() :: dist.world_size()]
        started, done = time.perf_counter(), 0
        with log.ProgressDisplay(sum(s.count for shards in mine for s in shards), unit="records") as progress:
            for shards in mine:
                writers = [ShardWriter(store, shard, manifest) for shard in shards]
                view, first, last = shards[0].view, shards[0].first, shards[0].last
                for batch in loader.batches(np.arange(first, last + 1), view):
                    for writer in writers:
                        logits = engine.forward_logits(teachers[writer.shard.checkpoint], batch.images, config.amp)
                        writer.append(logits.cpu().numpy())
                        done += len(logits)
                    progress.update(done, f"view {view + 1}/{config.views}, samples {first}-{last}")
                for writer in writers:
                    writer.commit()
        dist.barrier()
        seconds = time.perf_counter() - started
        log.say(f"{store}: complete, {records} records written in {seconds:.1f} s ({records / seconds:,.0f} records/s)")


if __name__ == "__main__":
    run_command(main, CacheConfig, "ckd_dist.cache_logits")
