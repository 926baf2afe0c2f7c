"""Checkpoints of which the right choice is known, and a selection among them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ckd_dist.core import checkpoint
from ckd_dist.nn import models
from data_prep.sources.datasets import load_source
from tests.helpers.commands import run
from tests.helpers.selection import QUICK, select_here
from tests.helpers.shared import make_once


@pytest.fixture(scope="session")
def coded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Images whose red channel is a garment that has nothing to do with the label, and whose blue one is a shade that
    is the label: split -> .beton."""

    def make(folder: Path) -> None:
        source, rng = load_source("fashion_mnist", None, train=False), np.random.default_rng(0)
        for split, count in (("train", 1000), ("holdout", 400)):
            for i in range(count):
                label = int(rng.integers(4))
                pixels = np.zeros((28, 28, 3), dtype=np.uint8)
                pixels[..., 0], pixels[..., 2] = source.images[i + 2000 * (split == "holdout")], 80 * label
                path = folder / split / str(label) / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
            options = ("--root", folder / split, "--split", "test", "--out", folder / f"{split}.beton")
            run("data_prep.write_beton", "--dataset", "imagefolder", *options)

    folder = make_once(tmp_path_factory, "coded", make)
    return {split: folder / f"{split}.beton" for split in ("train", "holdout")}


@pytest.fixture(scope="session")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three checkpoints whose features are made by hand: epoch 1 gives nothing, epoch 2 passes both the
    garment and the shade on, epoch 3 the garment only."""

    def make(folder: Path) -> None:
        for epoch, passed in ((1, []), (2, [0, 2]), (3, [0])):
            model = models.build_model("resnet8", 4)
            with torch.no_grad():
                for name, tensor in model.state_dict().items():
                    if "conv" in name or "shortcut.0" in name or name == "features.0.weight":
                        tensor.zero_()  # residual branches give nothing; shortcuts below copy
                    elif name.endswith("bias"):
                        tensor.fill_(4.0 if name == "features.1.bias" else 0.0)  # positive, so that no ReLU cuts
                for channel in passed:
                    model.features[0].weight[channel, channel, 1, 1] = 1.0
                for block in model.features:
                    if isinstance(getattr(block, "shortcut", None), torch.nn.Sequential):
                        for channel in range(16):
                            block.shortcut[0].weight[channel, channel] = 1.0
            metadata = {
                "model": "resnet8", "num_classes": 4, "epoch": epoch, "image_size": 28,
                "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "dataset": {},
            }  # fmt: skip
            path = checkpoint.checkpoint_path(folder / "run", epoch)
            path.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.save(path, {"weights": model.state_dict(), "metadata": metadata})

    return make_once(tmp_path_factory, "known", make) / "run"


@pytest.fixture(scope="session")
def chosen(tmp_path_factory: pytest.TempPathFactory, coded: dict[str, Path], known: Path) -> tuple[list, dict]:
    """(options, result) of a selection among them."""
    words = ["--data.train", coded["train"], "--data.val", coded["holdout"], "--data.flip", "false", *QUICK]
    words = [*words, "--teacher.run", known]
    folder = make_once(tmp_path_factory, "selection", lambda folder: select_here(*words, "--run_dir", folder / "first"))
    return words, json.loads((folder / "first" / "selection.json").read_text())
