"""Distil a student in a loop in the style of timm's train.py, from a store's logits, without FFCV.

  python examples/timm_loop.py --images data/train.beton --store stores/teacher --model resnet18 --out student.pt

Optimiser, schedule, moving average and meters are timm's; images, their order and the loss are the store's.
"""

import argparse

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import AverageMeter, ModelEmaV3, accuracy
from torch.utils.data import DataLoader

import ckd_dist
from ckd_dist.nn.models import build_model


def main() -> None:
    """Train a student."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="the .beton file that the store is of")
    parser.add_argument("--store", required=True, help="a logit store")
    parser.add_argument("--out", required=True, help="file for the moving average of the student's weights")
    parser.add_argument("--checkpoints", type=int, nargs="*", help="epochs of the teacher; default: the last")
    parser.add_argument("--model", default="resnet8", help="a network of timm or, unless timm has it, of ckd_dist")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--log_every", type=int, default=50)
    args = parser.parse_args()

    store = ckd_dist.open_store(args.store, args.checkpoints)
    views = ckd_dist.Views(ckd_dist.BetonImages(args.images), store.recipe, seed=store.seed, size=store.image_size)
    store.require_views(views)
    sampler = ckd_dist.ViewSampler(len(views), views=store.views, batch_size=args.batch_size, seed=args.seed)
    loader = DataLoader(views, batch_size=sampler.rank_batch_size, sampler=sampler, num_workers=args.workers)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    if timm.is_model(args.model):
        model = timm.create_model(args.model, num_classes=store.num_classes)
    else:
        model = build_model(args.model, store.num_classes)
    model = model.to(device).to(memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(
        model, opt="sgd", lr=args.lr, weight_decay=5e-4, filter_bias_and_bn=False, fused=True
    )
    scheduler = CosineLRScheduler(optimizer, t_initial=args.epochs * len(loader), t_in_epochs=False)
    average = ModelEmaV3(model, decay=0.99, use_warmup=True)

    updates = 0
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        losses, top1 = AverageMeter(), AverageMeter()
        for batch in loader:
            scheduler.step_update(updates)
            images, labels = batch["image"].to(device), batch["label"].to(device)
            logits = model(store.normalize(images))
            # Where the recipe mixes images, mixed=(batch["other_label"], batch["weight"]).
            loss = store.loss(logits, batch["id"], batch["view"], labels, alpha=0.5, temperature=4).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            updates += 1
            average.update(model, step=updates)
            losses.update(loss.item(), len(logits))
            top1.update(accuracy(logits, labels)[0].item(), len(logits))
            if updates % args.log_every == 0:
                print(f"step {updates} loss {losses.val:.7f}", flush=True)
        print(f"epoch {epoch} loss {losses.avg:.4f} top1 {top1.avg:.2f}", flush=True)
    torch.save(average.module.state_dict(), args.out)


if __name__ == "__main__":
    main()
