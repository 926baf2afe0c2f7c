"""Distil a student with Lightning, from a store's logits, without FFCV.

  python examples/lightning_module.py --images data/train.beton --store stores/teacher --out student.pt

`use_distributed_sampler=False` keeps Lightning from replacing the sampler, which knows views and ranks; Lightning tells
it the epoch by itself.
"""

import argparse
import math

import lightning
import torch
from torch.utils.data import DataLoader

import ckd_dist
from ckd_dist.nn.models import build_model  # or any other module that gives logits


class Student(lightning.LightningModule):
    """A student that learns from a store."""

    def __init__(self, store: ckd_dist.Store, model: str, lr: float, log_every: int):
        super().__init__()
        self.store, self.lr, self.log_every = store, lr, log_every
        self.model = build_model(model, store.num_classes).to(memory_format=torch.channels_last)

    def training_step(self, batch, batch_idx):
        """The loss of a batch of `ckd_dist.Views`."""
        logits = self.model(self.store.normalize(batch["image"]))
        # Where the recipe mixes images, mixed=(batch["other_label"], batch["weight"]).
        loss = self.store.loss(logits, batch["id"], batch["view"], batch["label"], alpha=0.5, temperature=4).mean()
        self.log("loss", loss)
        if (self.global_step + 1) % self.log_every == 0:
            print(f"step {self.global_step + 1} loss {loss.item():.7f}", flush=True)
        return loss

    def configure_optimizers(self):
        """SGD, and a cosine over all steps."""
        optimizer = torch.optim.SGD(
            self.parameters(), lr=self.lr, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True
        )
        steps = self.trainer.estimated_stepping_batches
        cosine = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}


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
    parser.add_argument("--devices", type=int, default=1)
    args = parser.parse_args()

    store = ckd_dist.open_store(args.store, args.checkpoints)
    views = ckd_dist.Views(ckd_dist.BetonImages(args.images), store.recipe, seed=store.seed, size=store.image_size)
    store.require_views(views)
    sampler = ckd_dist.ViewSampler(len(views), views=store.views, batch_size=args.batch_size, seed=args.seed)
    loader = DataLoader(views, batch_size=args.batch_size // args.devices, sampler=sampler, num_workers=args.workers)

    torch.manual_seed(args.seed)
    student = Student(store, args.model, args.lr, args.log_every)
    trainer = lightning.Trainer(
        max_epochs=args.epochs,
        devices=args.devices,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(student, loader)
    if trainer.is_global_zero:
        torch.save(student.model.state_dict(), args.out)


if __name__ == "__main__":
    main()
