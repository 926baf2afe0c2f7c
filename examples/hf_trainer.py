"""Distil a student with the Trainer of Hugging Face's transformers, from a store's logits, without FFCV.

  python examples/hf_trainer.py --images data/train.beton --store stores/teacher --out student.pt

The Trainer's own data loader would wrap the sampler, which knows views and ranks already: so it gets one that is ready.
"""

import argparse
import math
import tempfile

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import ckd_dist
from ckd_dist.nn.models import build_model  # or any other module that gives logits


class ViewLoader(DataLoader):
    """A DataLoader that the Trainer tells the epoch."""

    sampler: ckd_dist.ViewSampler

    def set_epoch(self, epoch: int) -> None:
        """Have the next iteration give this epoch."""
        self.sampler.set_epoch(epoch)


class Distiller(Trainer):
    """A Trainer whose loss is that of a store."""

    def __init__(self, store: ckd_dist.Store, views: ckd_dist.Views, sampler: ckd_dist.ViewSampler, **options):
        super().__init__(train_dataset=views, **options)
        self.store, self.views, self.sampler = store, views, sampler
        self.model_accepts_loss_kwargs = False  # the loss is a mean, for the Trainer to average over accumulated steps

    def get_train_dataloader(self) -> DataLoader:
        """The views in the order of the sampler; not prepared by accelerate, which would share them out again."""
        workers = self.args.dataloader_num_workers
        return ViewLoader(
            self.views, batch_size=self.sampler.rank_batch_size, sampler=self.sampler, num_workers=workers
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a batch of `ckd_dist.Views`."""
        logits = model(self.store.normalize(inputs["image"]))
        # Where the recipe mixes images, mixed=(inputs["other_label"], inputs["weight"]).
        loss = self.store.loss(logits, inputs["id"], inputs["view"], inputs["label"], alpha=0.5, temperature=4).mean()
        step = self.state.global_step + 1
        if step % self.args.logging_steps == 0:
            print(f"step {step} loss {loss.item():.7f}", flush=True)
        return (loss, {"logits": logits}) if return_outputs else loss


def main() -> None:
    """Train a student."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="the .beton file that the store is of")
    parser.add_argument("--store", required=True, help="a logit store")
    parser.add_argument("--out", required=True, help="file for the student's weights")
    parser.add_argument("--checkpoints", type=int, nargs="*", help="epochs of the teacher; default: the last")
    parser.add_argument("--model", default="resnet8")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=128, help="over all processes")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--log_every", type=int, default=50)
    args = parser.parse_args()

    store = ckd_dist.open_store(args.store, args.checkpoints)
    views = ckd_dist.Views(ckd_dist.BetonImages(args.images), store.recipe, seed=store.seed, size=store.image_size)
    store.require_views(views)
    sampler = ckd_dist.ViewSampler(len(views), views=store.views, batch_size=args.batch_size, seed=args.seed)

    torch.manual_seed(args.seed)
    model = build_model(args.model, store.num_classes).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=args.lr, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True
    )
    steps = args.epochs * (len(views) // args.batch_size)
    cosine = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    options = TrainingArguments(
        use_cpu=not torch.cuda.is_available(),  # else, without a GPU, ranks would train apart
        output_dir=tempfile.mkdtemp(),
        num_train_epochs=args.epochs,
        max_grad_norm=0,
        ddp_find_unused_parameters=False,
        seed=args.seed,
        dataloader_num_workers=args.workers,
        logging_steps=args.log_every,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    distiller = Distiller(store, views, sampler, model=model, args=options, optimizers=(optimizer, cosine))
    distiller.train()
    if distiller.is_world_process_zero():
        torch.save(model.state_dict(), args.out)


if __name__ == "__main__":
    main()
