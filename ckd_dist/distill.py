"""Train a student from a teacher's cached logits, from the online teacher, or plainly.

  torchrun --nproc_per_node=8 -m ckd_dist.distill --data.train train.beton --data.val holdout.beton \\
      --model.name resnet18 --teacher.store stores/teacher --teacher.checkpoints [20] --run_dir runs/student

--teacher.checkpoints [20,40] distills from the ensemble of both; with --teacher.combine sequence, first from one, then
from the other. --teacher.run runs/teacher, instead of --teacher.store, runs the teacher at every step. Neither of them:
the plain student, for the baseline. The same command again goes on from the last saved step.
"""

from functools import partial

from ckd_dist.config import DistillConfig, require, run_command


def main(config: DistillConfig) -> None:
    # Imported here because torch takes seconds: only once the options are known to be good.
    import torch

    from ckd_dist import caching, checkpoint, data, dist, engine, log, losses, models
    from ckd_dist.store import codecs
    from ckd_dist.store.reader import StoreReader

    kd, asked = config.kd, config.teacher
    weights: list[float] = []
    codec: codecs.Codec

    def plain_loss(logits, batch):
        return {"loss": losses.cross_entropy(logits, batch.labels, config.label_smoothing)}

    def distillation_loss(logits, batch):
        teacher = codecs.teacher_logits(codec, batch.teacher_records, kd, weights=weights, combine=asked.combine)
        values = losses.distillation(logits, teacher, batch.labels, kd, config.label_smoothing)
        answers = teacher.argmax(dim=1)
        values["teacher_top1"] = 100.0 * (answers == batch.labels)
        values["agreement"] = 100.0 * (answers == logits.argmax(dim=1))
        return values

    with dist.process_group() as device:
        info = data.read_info(config.data.train, "data.train")
        combine = asked.combine if len(asked.checkpoints) > 1 and asked.combine != "sequence" else None
        seed, views = config.data.view_seed, config.data.views
        recipe, reader = None, None
        epochs: list[int] = []
        members: list[torch.nn.Module] = []
        if asked.store:
            reader = StoreReader(asked.store, asked.checkpoints, info, kd, combine)
            cached, codec, epochs, recipe = reader.manifest, reader.codec, reader.epochs, reader.recipe
            require(
                seed in (None, cached.view_seed),
                f"data.view_seed is {seed}, the store holds views of seed {cached.view_seed}: leave it out",
            )
            require(
                (views or 1) <= cached.views,
                f"data.views is {views}, {asked.store} holds {cached.views} views: cache more or ask for less",
            )
            seed, views = cached.view_seed, views or cached.views
            digests = dist.on_main(lambda: caching.store_loader(cached, info, config.data, device).image_digests())
            if note := cached.decoding_note(digests):
                log.say(note)
            log.say(f"teacher: cached logits of {', '.join(f'epoch {epoch}' for epoch in epochs)}")
        elif asked.run:
            trajectory = checkpoint.trajectory(asked.run, "teacher.run")
            epochs = checkpoint.choose(trajectory, asked.checkpoints, "teacher.checkpoints")
            codec = dense = codecs.Dense(info.num_classes)
            codecs.require_served(codec, kd, combine)
            for epoch in epochs:
                model, metadata = models.load_model(trajectory[epoch], "teacher.run")
                models.require_classes(metadata, info.num_classes, "teacher.run")
                for key, ours in (("image_size", info.image_size(config.data.image_size)), ("mean", list(info.mean))):
                    require(
                        metadata[key] == ours,
                        f"teacher.run: the online teacher was trained with {key} {metadata[key]}, the student gets "
                        f"{ours}: cache its logits instead",
                    )
                members.append(engine.to_device(model, device))
            log.say(f"teacher: online, {', '.join(f'epoch {epoch}' for epoch in epochs)}")
        if views and views < config.epochs:
            log.say(f"{views} views for {config.epochs} epochs: epoch {views + 1} sees the first view again, and so on")
        shares = asked.weights or [1.0] * len(epochs)
        shares = [share / sum(shares) for share in shares]
        if asked.combine == "sequence":
            turns = engine.turns(shares, config.epochs)
            log.say(f"teachers in sequence: epochs {', '.join(str(epochs[turn]) for turn in turns)}")
            weights = [1.0]
        else:
            weights = shares

        def source(epoch: int) -> engine.Source:
            """The view of an epoch, and who teaches it."""
            chosen = [turns[epoch]] if asked.combine == "sequence" else list(range(len(epochs)))
            return engine.Source(
                view=epoch % (views or config.epochs),
                rows=partial(reader.rows, members=chosen) if reader else None,
                teacher=partial(engine.online_records, [members[m] for m in chosen], dense, config.amp)
                if members
                else None,
            )

        engine.train(
            config,
            distillation_loss if epochs else plain_loss,
            device=device,
            info=info,
            recipe=data.train_recipe(config.data, info, recipe),
            view_seed=seed or 0,
            source=source,
            save_every=config.save_every or config.epochs,
        )


if __name__ == "__main__":
    run_command(main, DistillConfig, "ckd_dist.distill")
