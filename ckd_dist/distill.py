"""Train a student from a teacher's cached logits, from the online teacher, or plainly.

  torchrun --nproc_per_node=8 -m ckd_dist.distill --data.train train.beton --data.val holdout.beton \\
      --model.name resnet18 --teacher.store stores/teacher --teacher.checkpoints [20] --run_dir runs/student

--teacher.checkpoints [20,40] distills from the ensemble of both; with --teacher.combine sequence, first from one, then
from the other. --teacher.run runs/teacher, instead of --teacher.store, runs the teacher at every step. Neither of them:
the plain student, for the baseline. The same command again goes on from the last saved step.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ckd_dist.config import DistillConfig, TeacherConfig, require, run_command

if TYPE_CHECKING:
    import torch

    from ckd_dist.data import DatasetInfo
    from ckd_dist.store.reader import StoreReader


def main(config: DistillConfig) -> None:
    # Imported here because torch takes seconds: only once the options are known to be good.
    from ckd_dist import data, dist, engine, log, losses
    from ckd_dist.store import codecs

    if config.teacher.selection:
        config = replace(config, teacher=with_selection(config.teacher))
    kd, asked = config.kd, config.teacher
    # How several checkpoints teach at once, if they do.
    combine = asked.combine if len(asked.checkpoints) > 1 and asked.combine != "sequence" else None

    def plain_loss(logits, batch):
        return {"loss": losses.cross_entropy(logits, batch.labels, config.label_smoothing)}

    def distillation_loss(logits, batch):
        ask = partial(codecs.teacher_logits, codec, batch.teacher_records, kd, weights=weights, combine=asked.combine)
        teacher = ask(logits.detach())
        values = losses.distillation(logits, teacher, batch.labels, kd, config.label_smoothing)
        # What top-k leaves out was filled in as the student has it: that is no answer of the teacher.
        answers = (ask() if isinstance(codec, codecs.TopK) else teacher).argmax(dim=1)
        values["teacher_top1"] = 100.0 * (answers == batch.labels)
        values["agreement"] = 100.0 * (answers == logits.argmax(dim=1))
        return values

    with dist.process_group() as device:
        info = data.read_info(config.data.train, "data.train")
        reader = cached_teacher(config, info, combine) if asked.store else None
        online = online_teacher(config, info, device) if asked.run else {}
        dense = codecs.Dense(info.num_classes)
        codec: codecs.Codec = reader.codec if reader else dense
        if online:
            codecs.require_served(dense, kd, combine)
        epochs = reader.epochs if reader else list(online)
        seed, views = config.data.view_seed, config.data.views
        if reader:
            seed, views = reader.manifest.view_seed, views or reader.manifest.views
        if views and views < config.epochs:
            log.say(f"{views} views for {config.epochs} epochs: epoch {views + 1} sees the first view again, and so on")
        weights = [weight / sum(asked.weights) for weight in asked.weights] or [1 / len(epochs) for _ in epochs]
        lessons = [list(range(len(epochs)))] * config.epochs  # which of the checkpoints teach in each epoch
        if asked.combine == "sequence":
            lessons = [[turn] for turn in engine.turns(weights, config.epochs)]
            weights = [1.0]
            log.say(f"teachers in sequence: epochs {', '.join(str(epochs[turn]) for (turn,) in lessons)}")

        def source(epoch: int) -> engine.Source:
            """The view of an epoch, and who teaches it."""
            members = [online[epochs[m]] for m in lessons[epoch]] if online else []
            return engine.Source(
                view=epoch % (views or config.epochs),
                rows=partial(reader.rows, members=lessons[epoch]) if reader else None,
                teacher=partial(engine.online_records, members, dense, config.amp) if members else None,
            )

        engine.train(
            config,
            distillation_loss if epochs else plain_loss,
            device=device,
            info=info,
            recipe=data.train_recipe(config.data, info, reader.recipe if reader else None),
            view_seed=seed or 0,
            source=source,
            save_every=config.save_every or config.epochs,
        )


def with_selection(asked: TeacherConfig) -> TeacherConfig:
    """The teacher that select_teacher chose; raises `UserError` where its weights are not those of the store or run."""
    from ckd_dist import checkpoint, models, selection
    from ckd_dist.store.manifest import Manifest, member_name

    assert asked.selection is not None
    epoch, chosen = selection.read_choice(asked.selection, "teacher.selection")
    if asked.store:
        members = Manifest.load(Path(asked.store), "teacher.store").checkpoints
        found = members.get(member_name(epoch), {}).get("weights_sha256", "missing")
    else:
        trajectory = checkpoint.trajectory(asked.run or "", "teacher.run")
        checkpoint.choose(trajectory, [epoch], "teacher.selection")
        found = checkpoint.weights_sha256(models.load_model(trajectory[epoch], "teacher.run")[0].state_dict())
    require(
        found == chosen,
        f"teacher.selection: it chose epoch {epoch} with weights {chosen[:12]}, {asked.store or asked.run} has "
        f"{found[:12]}: they are of different runs",
    )
    return replace(asked, selection=None, checkpoints=[epoch])


def cached_teacher(config: DistillConfig, info: DatasetInfo, combine: str | None) -> StoreReader:
    """The store that the options name; raises `UserError` where it does not fit the images, the loss or the views."""
    import numpy as np
    import torch

    from ckd_dist import caching, dist, log
    from ckd_dist.store import codecs
    from ckd_dist.store.reader import StoreReader

    store, seed, views = config.teacher.store, config.data.view_seed, config.data.views
    assert store is not None
    reader = StoreReader(store, config.teacher.checkpoints, info, config.kd, combine)
    manifest = reader.manifest
    require(
        seed in (None, manifest.view_seed),
        f"data.view_seed is {seed}, the store holds views of seed {manifest.view_seed}: leave it out",
    )
    require(
        (views or 1) <= manifest.views,
        f"data.views is {views}, {store} holds {manifest.views} views: cache more or ask for less",
    )
    log.say(f"teacher: cached logits of {', '.join(f'epoch {epoch}' for epoch in reader.epochs)}")
    codec, temperature = reader.codec, config.kd.temperature
    if isinstance(codec, codecs.TopK) and config.kd.loss != "standardized":
        some = torch.from_numpy(reader.rows(np.arange(min(1000, info.count)), 0)[:, 0])
        share = codec.kept(some, temperature).mean().item()
        if share < 0.5:
            log.say(
                f"warning: at kd.temperature {temperature:g} the {codec.k} classes kept hold {100 * share:.0f} % of "
                "the teacher's softmax: a student learns little from so few; lower it, or use a dense store"
            )
    if note := dist.on_main(lambda: manifest.decoding_note(caching.image_digests(manifest, info))):
        log.say(note)
    return reader


def online_teacher(config: DistillConfig, info: DatasetInfo, device: torch.device) -> dict[int, torch.nn.Module]:
    """Epoch -> checkpoint on the device; raises `UserError` where the student's images are not the teacher's."""
    from ckd_dist import checkpoint, engine, log, models

    assert config.teacher.run is not None
    trajectory = checkpoint.trajectory(config.teacher.run, "teacher.run")
    epochs = checkpoint.choose(trajectory, config.teacher.checkpoints, "teacher.checkpoints")
    members = {}
    for epoch in epochs:
        model, metadata = models.load_model(trajectory[epoch], "teacher.run")
        models.require_classes(metadata, info.num_classes, "teacher.run")
        for key, ours in (("image_size", info.image_size(config.data.image_size)), ("mean", list(info.mean))):
            require(
                metadata[key] == ours,
                f"teacher.run: the online teacher was trained with {key} {metadata[key]}, the student gets "
                f"{ours}: cache its logits instead",
            )
        members[epoch] = engine.to_device(model, device)
    log.say(f"teacher: online, {', '.join(f'epoch {epoch}' for epoch in epochs)}")
    return members


if __name__ == "__main__":
    run_command(main, DistillConfig, "ckd_dist.distill")
