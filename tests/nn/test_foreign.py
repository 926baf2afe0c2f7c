"""Checkpoints of other programs, written by these: the same weights to the bit, or a refusal that says why."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import warnings
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ckd_dist.core.errors import UserError
from ckd_dist.nn import fitting, foreign
from ckd_dist.nn.models import build_model
from tests.helpers.commands import PROGRAMS, run


def network(seed: int = 0, num_classes: int = 10) -> nn.Module:
    """A resnet8 whose every tensor, batch norm's too, has values of its own."""
    torch.manual_seed(seed)
    model = build_model("resnet8", num_classes)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.copy_(torch.randn(tensor.shape) if tensor.is_floating_point() else torch.tensor(7 + seed))
    return model


quiet = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
"""Of tests that save in shards, in one process."""


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """One that has taken a step, so that it has momenta of every weight."""
    found = torch.optim.SGD(model.parameters(), 0.0, momentum=0.9)
    model(torch.zeros(2, 3, 8, 8)).sum().backward()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found.step()
    model.load_state_dict(before)
    return found


def namespace() -> argparse.Namespace:
    return argparse.Namespace(lr=0.1, output_dir=Path("runs"), milestones=[1, 2], model="resnet8", amp=None)


# ------------------------------------------------------------------------------------------- what is read


def torchvision_reference(path: Path) -> tuple[nn.Module, int | None]:
    """As references/classification/train.py of torchvision saves it."""
    model = network()
    average = AveragedModel(network(1), multi_avg_fn=get_ema_multi_avg_fn(0.9))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer(model), 1)
    state = {"model": model.state_dict(), "optimizer": optimizer(model).state_dict(), "epoch": 20, "args": namespace()}
    torch.save({**state, "lr_scheduler": schedule.state_dict(), "model_ema": average.state_dict()}, path)
    return model, 20


def timm_saver(path: Path) -> tuple[nn.Module, int | None]:
    from timm.utils import CheckpointSaver, ModelEmaV3

    model = network()
    saver = CheckpointSaver(
        model,
        optimizer(model),
        args=namespace(),
        model_ema=ModelEmaV3(network(1)),
        checkpoint_dir=str(path.parent),
        recovery_dir=str(path.parent),
    )
    saver.save_checkpoint(5, metric=np.float64(71.5))
    (path.parent / "last.pth.tar").rename(path)
    return model, 5


def lightning_trainer(path: Path) -> tuple[nn.Module, int | None]:
    import lightning

    class Classifier(lightning.LightningModule):
        def __init__(self, lr: float, options: dict, folder: Path):
            super().__init__()
            self.save_hyperparameters()
            self.model = network()
            self.criterion = nn.CrossEntropyLoss(weight=torch.ones(10))

        def training_step(self, batch, number):
            return self.criterion(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), self.hparams.lr, momentum=0.9)

    module = Classifier(0.1, {"width": 16}, path.parent)
    images = torch.utils.data.TensorDataset(torch.randn(8, 3, 8, 8), torch.arange(8))
    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", enable_checkpointing=False, default_root_dir=path.parent, **silent
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, torch.utils.data.DataLoader(images, 4))
        trainer.save_checkpoint(path)
    return module.model, torch.load(path, weights_only=False)["epoch"]


def data_parallel(path: Path) -> tuple[nn.Module, int | None]:
    model = network()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        torch.save({"state_dict": DistributedDataParallel(model).state_dict(), "epoch": 3, "arch": "x"}, path)
    finally:
        torch.distributed.destroy_process_group()
    return model, 3


def compiled(path: Path) -> tuple[nn.Module, int | None]:
    model = network()
    torch.save(torch.compile(model).state_dict(), path)
    return model, None


def compiled_in_parts(path: Path) -> tuple[nn.Module, int | None]:
    model, other = network(), network()
    other.features[4].compile()
    other.features[4] = torch.compile(other.features[4])
    torch.save({"module." + name: tensor for name, tensor in other.state_dict().items()}, path)
    return model, None


def safetensors_file(path: Path) -> tuple[nn.Module, int | None]:
    from safetensors.torch import save_file

    model = network()
    save_file(model.state_dict(), path, {"format": "pt"})
    return model, None


def transformers_pretrained(path: Path) -> tuple[nn.Module, int | None]:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=10)
    model = ResNetForImageClassification(config)
    model.save_pretrained(path.parent / "saved")
    (path.parent / "saved" / "model.safetensors").rename(path)
    return model, None


def plain(path: Path) -> tuple[nn.Module, int | None]:
    model = network()
    torch.save(model.state_dict(), path)
    return model, None


def averaged(path: Path) -> tuple[nn.Module, int | None]:
    model = network()
    torch.save(AveragedModel(model).state_dict(), path)
    return model, None


def legacy(path: Path) -> tuple[nn.Module, int | None]:
    model = network()
    state = {"epoch": 4, "state_dict": model.state_dict(), "optimizer": optimizer(model).state_dict()}
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return model, 4


def with_numpy(path: Path) -> tuple[nn.Module, int | None]:
    model = network()
    figures = {"best": np.float32(71.5), "epochs": np.int64(3), "curve": np.arange(3.0), "dtype": np.dtype("float64")}
    random_state = np.random.RandomState(0).get_state()
    history = defaultdict(list, loss=[1.0, 2.0])
    torch.save({"net": model.state_dict(), "figures": figures, "random": random_state, "history": history}, path)
    return model, None


def old_batch_norm(path: Path) -> tuple[nn.Module, int | None]:
    """Of PyTorch 0.4 or before, or of another framework: batch norm counts nothing."""
    model = network()
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.zero_()
    named = ((k, v) for k, v in model.state_dict().items() if "num_batches" not in k)
    torch.save(OrderedDict(named), path)
    return model, None


def own(path: Path) -> tuple[nn.Module, int | None]:
    """Of this system."""
    model = network()
    torch.save({"weights": model.state_dict(), "metadata": {"model": "resnet8", "epoch": 12}}, path)
    return model, 12


WRITERS = (
    torchvision_reference, timm_saver, lightning_trainer, data_parallel, compiled, compiled_in_parts, safetensors_file,
    transformers_pretrained, plain, averaged, legacy, with_numpy, old_batch_norm, own,
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:The `srun` command")  # Lightning, on a machine with SLURM
@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_the_weights_of_a_foreign_checkpoint_are_those_that_were_saved(write, tmp_path):
    path = tmp_path / "checkpoint"
    model, epoch = write(path)
    content = foreign.read(path, "files")
    found = fitting.fit(content, model, "the network", str(path))
    expected = model.state_dict()
    assert found.weights.keys() == expected.keys()
    assert all(torch.equal(found.weights[name], expected[name]) for name in expected)
    assert foreign.epoch_of(content) == epoch


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_half_precision_are_widened_without_a_change(dtype, tmp_path):
    model = network().to(dtype)
    torch.save(model.state_dict(), tmp_path / "half.pt")
    found = fitting.fit(foreign.read(tmp_path / "half.pt", "files"), network(1), "resnet8", "half.pt")
    assert all(torch.equal(each, model.state_dict()[name].to(each.dtype)) for name, each in found.weights.items())
    assert found.weights["fc.weight"].dtype == torch.float32
    assert found.notes == [f"{str(dtype)[6:]} taken as float32, exactly"]


@quiet
def test_a_folder_of_a_sharded_training_is_read_when_it_is_trusted(tmp_path):
    model = network()
    state = {"model": model.state_dict(), "optim": optimizer(model).state_dict(), "epoch": 7}
    dcp.save(state, checkpoint_id=tmp_path / "step", no_dist=True)
    with pytest.raises(UserError, match=r"files: .*/step/\.metadata is a pickle, which runs .*: give --trust"):
        foreign.read(tmp_path / "step", "files")
    content = foreign.read(tmp_path / "step", "files", trust=True)
    found = fitting.fit(content, network(1), "resnet8", "step")
    assert all(torch.equal(found.weights[name], tensor) for name, tensor in model.state_dict().items())
    assert found.key == "model" and foreign.epoch_of(content) == 7


def test_what_two_ranks_sharded_by_fsdp_is_read_whole_and_a_part_of_it_is_refused(tmp_path):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("needs FSDP2")
    run(str(PROGRAMS / "save_sharded.py"), tmp_path, nproc=2)
    found = fitting.fit(foreign.read(tmp_path / "step", "files", trust=True), network(1), "resnet8", "step")
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    assert found.key == "app.model"
    assert all(torch.equal(each, whole[name]) for name, each in found.weights.items())
    with pytest.raises(UserError, match=r"DTensor.*(gather them first|save them as plain)"):
        fitting.fit(foreign.read(tmp_path / "rank0.pt", "files"), network(1), "resnet8", "rank0.pt")


# ------------------------------------------------------------------------------------------- which of several


def test_several_that_fit_are_told_and_a_key_takes_another(tmp_path):
    path = tmp_path / "checkpoint.pth"
    model, _ = torchvision_reference(path)
    content = foreign.read(path, "files")
    found = fitting.fit(content, network(2), "resnet8", str(path))
    assert (found.key, found.others) == ("model", ["model_ema"])
    assert torch.equal(found.weights["fc.weight"], model.fc.weight)
    average = fitting.fit(content, network(2), "resnet8", str(path), key="model_ema")
    assert (average.key, average.others, average.notes) == ("model_ema", [], ["left out: n_averaged"])
    assert all(torch.equal(average.weights[name], each) for name, each in network(1).state_dict().items())
    with pytest.raises(UserError, match=r"key: .*checkpoint\.pth has no weights at ema; there are: model, model_ema$"):
        fitting.fit(content, network(2), "resnet8", str(path), key="ema")


def test_two_networks_of_one_module_are_told_apart_by_their_prefix(tmp_path):
    both = nn.ModuleDict({"student": network(0), "teacher": network(1)})
    torch.save({"state_dict": {f"net.{name}": each for name, each in both.state_dict().items()}}, tmp_path / "x.pt")
    content = foreign.read(tmp_path / "x.pt", "files")
    found = fitting.fit(content, network(2), "resnet8", "x.pt")
    assert (found.key, found.others) == ("state_dict.net.student", ["state_dict.net.teacher"])
    found = fitting.fit(content, network(2), "resnet8", "x.pt", key="state_dict.net.teacher")
    assert all(torch.equal(found.weights[name], each) for name, each in network(1).state_dict().items())


def test_what_a_network_has_only_in_training_is_left_out_and_named(tmp_path):
    import torchvision

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torchvision.models.googlenet(num_classes=10, aux_logits=True, init_weights=False)
    torch.save(model.state_dict(), tmp_path / "x.pt")
    content = foreign.read(tmp_path / "x.pt", "files")
    found = fitting.fit(content, build_model("googlenet", 10), "googlenet", "x.pt")
    assert all(torch.equal(each, model.state_dict()[name]) for name, each in found.weights.items())
    assert "left out: aux1.conv.conv.weight" in found.notes[0]


# ------------------------------------------------------------------------------------------- what does not fit


def test_every_tensor_that_does_not_fit_is_named_with_both_shapes(tmp_path):
    state = network(num_classes=100).state_dict()
    del state["features.0.weight"]
    state["features.9.weight"] = torch.zeros(5)
    for changed, expected in (
        (
            network(num_classes=100).state_dict(),
            r"fc\.weight is \(100, 64\) in the file, \(10, 64\) in the model; fc\.b",
        ),
        (state, r"features\.0\.weight \(16, 3, 3, 3\) is not in the file; fc\.weight is .*; and 1 more: choose"),
        (network().state_dict() | {"features.9.weight": torch.zeros(5)}, r"features\.9\.weight \(5,\) is not in the m"),
        (network().state_dict() | {"fc.bias": torch.zeros(10).long()}, r"fc\.bias \(10,\) is of torch\.int64, not"),
        (network().state_dict() | {"fc.bias": torch.full((10,), torch.nan)}, r"fc\.bias \(10,\) holds values that are"),
        (
            network().state_dict() | {"fc.bias": torch.zeros(10).to_sparse()},
            r"fc\.bias \(10,\) is a Tensor of layout sparse_coo, no plain",
        ),
        ({"a": torch.zeros(3)}, r"x\.pt holds no tensor under a name of resnet8, such as features\.0\.weight"),
        ({"a": 3}, r"x\.pt holds no tensor under a name of resnet8"),
    ):
        torch.save({"model": changed}, tmp_path / "x.pt")
        content = foreign.read(tmp_path / "x.pt", "files")
        with pytest.raises(UserError, match=expected) as error:
            fitting.fit(content, network(), "resnet8", "files: x.pt")
        assert "\n" not in str(error.value) and re.search("--model.name$|as plain, finite", str(error.value))


# ------------------------------------------------------------------------------------------- what is refused


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path, function: object = os.mkdir):
        self.path, self.function = path, function

    def __reduce__(self):
        return self.function, (str(self.path),)


def refusal(path: Path, **options: bool) -> str:
    with pytest.raises(UserError) as error:
        foreign.read(path, "files", **options)
    assert "\n" not in str(error.value) and str(error.value).startswith(f"files: {path}")
    return str(error.value)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("function", "name"), [(os.mkdir, r"mkdir"), (open, "open"), (eval, "eval"), (Path.mkdir, "getattr")]
)
def test_a_payload_does_not_run(function, name, zipped, tmp_path):
    path = tmp_path / "evil.pt"
    payload = Payload(tmp_path / "ran", function)
    state = {"model": network().state_dict(), "args": payload}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    assert f"{name}, which might run code" in refusal(path)
    assert not (tmp_path / "ran").exists()
    if function is os.mkdir:  # as it does where pickles are trusted
        torch.load(path, weights_only=False)
        assert (tmp_path / "ran").exists()


@quiet
def test_a_payload_in_a_folder_does_not_run_unless_it_is_trusted(tmp_path):
    dcp.save({"model": network().state_dict()}, checkpoint_id=tmp_path / "step", no_dist=True)
    (tmp_path / "step" / ".metadata").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    assert "give --trust true if you know who wrote it" in refusal(tmp_path / "step")
    assert not (tmp_path / "ran").exists()
    assert "is damaged" in refusal(tmp_path / "step", trust=True)
    assert (tmp_path / "ran").exists()


def test_a_stand_in_takes_the_place_of_what_a_file_names(tmp_path):
    """Not even a class of the list is built: a Namespace of it is none."""
    torch.save({"args": namespace(), "path": Path("x"), "figure": np.float64(3)}, tmp_path / "x.pt")
    content = foreign.read(tmp_path / "x.pt", "files")
    assert all(list(each) == [] and type(each).__module__ == foreign.__name__ for each in content.values())


def test_what_is_no_checkpoint_of_weights_is_refused_by_name(tmp_path):
    path = tmp_path / "x"
    torch.save(network(), path)
    assert "holds a whole network (ckd_dist.nn.cifar._Classifier), " in refusal(path)
    torch.save(network(), path, _use_new_zipfile_serialization=False)
    assert "_Classifier, which might run code: load it where it was written and save" in refusal(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(nn.Linear(3, 2)).save(str(path))
    assert "is a program of TorchScript: " in refusal(path)
    torch.save(torch.zeros(3), path)
    assert "holds a Tensor, not a dict of weights" in refusal(path)
    torch.save([network().state_dict()], path)
    assert "holds a list, not a dict of weights" in refusal(path)
    for content in (
        b"<!DOCTYPE html><html>404</html>",
        b"version https://git-lfs.github.com/spec/v1\n",
        b"\x89PNG\r\n",
    ):
        path.write_bytes(content)
        assert "is no checkpoint: name a file of torch.save" in refusal(path)
    path.write_bytes(b"")
    assert "x is " in refusal(path)
    path.unlink()
    with pytest.raises(UserError, match=r"files: no such file: .*/x"):
        foreign.read(path, "files")
    path.mkdir()
    assert "is a folder, but none of transformers or torch.distributed" in refusal(path)


@pytest.mark.parametrize("write", [plain, legacy, safetensors_file], ids=lambda write: write.__name__)
def test_a_file_that_is_cut_short_is_refused_wherever_it_ends(write, tmp_path):
    path = tmp_path / "x"
    write(path)
    whole = path.read_bytes()
    for share in (0.02, 0.3, 0.7, 0.999):
        path.write_bytes(whole[: int(share * len(whole))])
        assert re.search("is damaged or cut short|is no whole safetensors file", refusal(path)), share


def test_an_archive_with_another_byte_is_refused_wherever_that_is(tmp_path):
    """torch itself reads most of these, and gives other weights."""
    path, rng = tmp_path / "x", np.random.default_rng(0)
    model, _ = torchvision_reference(path)
    whole = path.read_bytes()
    refused = 0
    for place in rng.integers(0, len(whole), 60):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x5A]) + whole[place + 1 :])
        try:
            found = fitting.fit(foreign.read(path, "files"), model, "resnet8", "x")
        except UserError as error:
            assert str(error).isprintable()
            refused += 1
        else:  # between the entries, or in what the index says of them
            assert all(torch.equal(each, model.state_dict()[name]) for name, each in found.weights.items())
    assert refused > 40


def test_a_pickle_protocol_that_torch_cannot_read_safely_is_named(tmp_path):
    torch.save({"args": namespace(), "model": network().state_dict()}, tmp_path / "x.pt", pickle_protocol=4)
    assert "of a pickle protocol that torch does not read safely" in refusal(tmp_path / "x.pt")


def test_an_archive_of_something_else_is_no_checkpoint(tmp_path):
    np.savez(tmp_path / "x.npz", weights=np.ones(3))
    assert "is no checkpoint: name a file of torch.save" in refusal(tmp_path / "x.npz")


@quiet
def test_a_folder_that_lacks_a_shard_is_refused(tmp_path):
    dcp.save({"model": network().state_dict()}, checkpoint_id=tmp_path / "step", no_dist=True)
    next((tmp_path / "step").glob("*.distcp")).unlink()
    assert "is damaged ([Errno 2] No such file" in refusal(tmp_path / "step", trust=True)


def test_a_dict_that_holds_itself_is_walked_once(tmp_path):
    state: dict = {"model": network().state_dict()}
    state["self"] = state
    torch.save(state, tmp_path / "x.pt")
    assert fitting.fit(foreign.read(tmp_path / "x.pt", "files"), network(), "resnet8", "x.pt").key == "model"


def test_folders_of_transformers_are_read_with_the_names_that_the_network_has(tmp_path):
    """The library saves a ViT under other names than those of its modules."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=10))
    folder = tmp_path / "checkpoint-500"
    model.save_pretrained(folder)
    (folder / "trainer_state.json").write_text(json.dumps({"epoch": 5.0, "global_step": 500}))
    content = foreign.read(folder, "files")
    assert foreign.epoch_of(content) == 5
    found = fitting.fit(content, build_model(f"hf/{folder}", 10), "the network", "it")
    assert all(torch.equal(each, found.weights[key]) for key, each in model.state_dict().items())
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"files: .*checkpoint-500 holds no image classifier of transformers \("):
        foreign.read(folder, "files")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"is a folder, but none of transformers or torch\.dist"):
        foreign.read(tmp_path / "empty", "files")
