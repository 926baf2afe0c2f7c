"""Distil a student in a plain PyTorch loop, from a store's logits, without FFCV.

  python examples/plain_pytorch.py --images data/train.beton --store stores/teacher --out student.pt

It is the training that `python -m ckd_dist.distill` does with the same options: the same images in the same order, the
same loss at every step and, on a CPU, the same weights, bit for bit.
"""

import argparse
import math

import torch
from torch.utils.data import DataLoader

import ckd_dist
from ckd_dist.nn.models import build_model  # or any other module that gives logits


def main() -> None:
    """Train a student."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="the .beton file that the store is of")
    parser.add_argument("--store", required=True, help="a logit store")
    parser.add_argument("--out", required=True, help="file for the student's weights")
    parser.add_argument("--checkpoints", type=int, nargs="*", help="epochs of the teacher; default: the last")
    parser.add_argument("--model", default="resnet8")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--log_every", type=int, default=50)
    args = parser.parse_args()

    store = ckd_dist.open_store(args.store, args.checkpoints)
    views = ckd_dist.Views(ckd_dist.BetonImages(args.images), store.recipe, seed=store.seed, size=store.image_size)
    store.require_views(views)  # the student sees what the teacher saw, to the byte
    sampler = ckd_dist.ViewSampler(len(views), views=store.views, batch_size=args.batch_size, seed=args.seed)
    loader = DataLoader(
        views,
        batch_size=sampler.rank_batch_size,
        sampler=sampler,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
    )

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    model = build_model(args.model, store.num_classes).to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=args.lr, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True
    )
    steps, step = args.epochs * len(loader), 0
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        for batch in loader:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            images, labels = batch["image"].to(device), batch["label"].to(device)
            logits = model(store.normalize(images))
            # Where the recipe mixes images, mixed=(batch["other_label"], batch["weight"]).
            loss = store.loss(logits, batch["id"], batch["view"], labels, alpha=0.5, temperature=4).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % args.log_every == 0:
                print(f"step {step} loss {loss.item():.7f}", flush=True)
    torch.save(model.state_dict(), args.out)


if __name__ == "__main__":
    main()
