"""Train a student from a teacher's cached logits, from the online teacher, or plainly.

  torchrun --nproc_per_node=8 -m ckd_dist.distill --data.train train.beton --data.val holdout.beton \\
      --model.name resnet18 --teacher.store stores/teacher --teacher.checkpoints [20] --run_dir runs/student

--teacher.checkpoints [20,40] distills from the ensemble of both. --teacher.run runs/teacher, instead of
--teacher.store, runs the teacher at every step. Neither of them: the plain student, for the baseline. The same
command again goes on from the last saved step.
"""

from functools import partial

from ckd_dist.config import DistillConfig, require, run_command


def main(config: DistillConfig) -> None:
    # Imported here because torch takes seconds: only once the options are known to be good.
    from ckd_dist import checkpoint, data, dist, engine, log, losses, models
    from ckd_dist.store.reader import StoreReader

    def plain_loss(logits, batch):
        return {"loss": losses.cross_entropy(logits, batch.labels, config.label_smoothing)}

    def distillation_loss(logits, batch):
        values = losses.distillation(logits, batch.teacher_logits, batch.labels, config.kd, config.label_smoothing)
        answers = batch.teacher_logits.argmax(dim=1)
        values["teacher_top1"] = 100.0 * (answers == batch.labels)
        values["agreement"] = 100.0 * (answers == logits.argmax(dim=1))
        return values

    with dist.process_group() as device:
        info = data.read_info(config.data.train, "data.train")
        reader: StoreReader | None = None
        teacher: engine.OnlineTeacher | None = None
        seed, views = config.data.view_seed, config.data.views
        if config.teacher.store:
            reader = StoreReader(config.teacher.store, config.teacher.checkpoints, info)
            cached = reader.manifest
            require(
                seed in (None, cached.view_seed),
                f"data.view_seed is {seed}, the store holds views of seed {cached.view_seed}: leave it out",
            )
            require(
                (views or 1) <= cached.views,
                f"data.views is {views}, {config.teacher.store} holds {cached.views} views: cache more or ask for less",
            )
            seed, views = cached.view_seed, views or cached.views
            log.say(f"teacher: cached logits of {', '.join(f'epoch {epoch}' for epoch in reader.epochs)}")
        elif config.teacher.run:
            trajectory = checkpoint.trajectory(config.teacher.run, "teacher.run")
            epochs = checkpoint.choose(trajectory, config.teacher.checkpoints, "teacher.checkpoints")
            members = []
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

            teacher = partial(engine.online_logits, members, amp=config.amp)
            log.say(f"teacher: online, {', '.join(f'epoch {epoch}' for epoch in epochs)}")
        if views and views < config.epochs:
            log.say(f"{views} views for {config.epochs} epochs: epoch {views + 1} sees the first view again, and so on")
        engine.train(
            config,
            distillation_loss if reader or teacher else plain_loss,
            device=device,
            info=info,
            recipe=data.train_recipe(config.data, info, reader.recipe if reader else None),
            view_seed=seed or 0,
            view_of_epoch=lambda epoch: epoch % (views or config.epochs),
            save_every=config.save_every or config.epochs,
            teacher=teacher,
            rows=reader.rows if reader else None,
        )


if __name__ == "__main__":
    run_command(main, DistillConfig, "ckd_dist.distill")
