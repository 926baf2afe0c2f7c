"""Checkpoints of other programs become a run, which every command takes as a teacher's."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from ckd_dist import adopt
from ckd_dist.core import checkpoint
from ckd_dist.core.errors import UserError
from ckd_dist.core.options import load_config
from ckd_dist.nn.models import load_model
from ckd_dist.train.options import AdoptConfig
from tests.helpers.commands import run
from tests.helpers.data_prep import write
from tests.helpers.here import run_here
from tests.helpers.stores import contents
from tests.helpers.training import metrics, summary


@pytest.fixture
def files(teacher: Path, tmp_path: Path) -> dict[int, Path]:
    """The shared teacher's checkpoints of epochs 1 and 3 as torchvision's references would have saved them."""
    found = {}
    for epoch in (1, 3):
        weights = checkpoint.load(checkpoint.checkpoint_path(teacher, epoch), "")["weights"]
        wrapped = {f"module.{name}": tensor for name, tensor in weights.items()}
        found[epoch] = tmp_path / f"model_{epoch}.pth"
        args = argparse.Namespace(output_dir=Path("runs"), lr=0.1)
        torch.save({"model": wrapped, "epoch": epoch, "args": args}, found[epoch])
    return found


def words(files, fashion, run_dir, *more):
    """The command line of adopt, later options winning."""
    paths = f"[{','.join(map(str, files))}]"
    given = ["--files", paths, "--model.name", "resnet8", "--data.val", fashion["holdout"], "--run_dir", run_dir]
    return [str(word) for word in [*given, *more]]


def adopt_here(*words):
    adopt.main(load_config(AdoptConfig, list(words)))


def refusal(*words) -> str:
    with pytest.raises(UserError) as error:
        adopt_here(*words)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_adopted_run_is_like_the_one_that_the_files_come_from(files, fashion, teacher, tmp_path, capsys):
    """Also in its accuracy: the figures are those that train_teacher wrote down."""
    options = words(files.values(), fashion, tmp_path / "run", "--amp", "off", "--data.batch_size", 32)
    adopt_here(*options)
    told = capsys.readouterr().out
    assert f"{files[1]}: the weights at model, epoch 1\n" in told and "2 checkpoints of resnet8" in told
    theirs = checkpoint.trajectory(teacher, "")
    assert list(checkpoint.trajectory(tmp_path / "run", "")) == [1, 3]
    for epoch, path in checkpoint.trajectory(tmp_path / "run", "").items():
        model, metadata = load_model(path, "")
        expected, original = load_model(theirs[epoch], "")
        assert all(torch.equal(each, expected.state_dict()[name]) for name, each in model.state_dict().items())
        for key in ("model", "num_classes", "classes", "image_size", "val_image_size", "mean", "std", "epoch"):
            assert metadata[key] == original[key], key
    kept = {line["epoch"]: line["top1"] for line in metrics(teacher, "val")}
    found = {line["epoch"]: line["top1"] for line in metrics(tmp_path / "run", "val")}
    assert found == pytest.approx({0: kept[0], 2: kept[2]}, abs=1)  # the teacher may have been measured in bfloat16
    assert summary(tmp_path / "run")["top1"] == found[2] and summary(tmp_path / "run")["epochs"] == 3
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted(path.name for path in teacher.iterdir())
    before = contents(tmp_path / "run")
    adopt_here(*options)
    assert f"complete already, top1 {found[2]:.2f}" in capsys.readouterr().out
    assert contents(tmp_path / "run") == before


def test_two_processes_adopt_what_one_does(files, fashion, tmp_path):
    options = ["--amp", "off", "--data.batch_size", 32]
    done = run("ckd_dist.adopt", *words(files.values(), fashion, tmp_path / "two", *options), nproc=2)
    adopt_here(*words(files.values(), fashion, tmp_path / "one", *options))
    assert done.stdout.count("the weights at model, epoch 3") == 1
    for one, two in zip(metrics(tmp_path / "one", "val"), metrics(tmp_path / "two", "val"), strict=True):
        assert one["top1"] == two["top1"] and one["loss"] == pytest.approx(two["loss"], rel=1e-5)  # summed otherwise
    assert summary(tmp_path / "two")["world_size"] == 2
    refused = run("ckd_dist.adopt", *words([fashion["test"]], fashion, tmp_path / "no"), nproc=2, status=1)
    assert refused.stderr.count("is no checkpoint: name a file") == 1 and not (tmp_path / "no").exists()


def test_every_command_takes_an_adopted_run(files, fashion, tmp_path):
    adopted, few = tmp_path / "adopted", ["--data.train", fashion["holdout"], "--data.batch_size", 100]
    adopt_here(*words(files.values(), fashion, adopted))
    run_here("cache_logits", *few, "--teacher.run", adopted, "--store", tmp_path / "store", "--views", 1)
    student = [*few, "--data.val", fashion["test"], "--model.name", "resnet8", "--epochs", 1]
    run_here("distill", *student, "--teacher.store", tmp_path / "store", "--run_dir", tmp_path / "cached")
    run_here("evaluate", "--data.val", fashion["test"], "--checkpoint", adopted / "checkpoints" / "epoch_0003.pt")
    selected = ["--teacher.run", adopted, "--run_dir", tmp_path / "selection", "--student", "resnet8"]
    probe = ["--probe.steps", 4, "--probe.repeats", 1]
    run_here("select_teacher", *few, "--data.val", fashion["test"], *selected, *probe)
    assert json.loads((tmp_path / "selection" / "selection.json").read_text())["choice"] in (1, 3)
    tree = run("ckd_dist.lineage", tmp_path / "cached").stdout
    assert "a run, resnet8, 3 epochs" in tree
    assert tree.count("a checkpoint of another program, sha256:") == 2
    files[3].write_bytes(files[3].read_bytes()[:-1] + b"\1")
    assert "sha256 was" in run("ckd_dist.lineage", adopted, status=1).stdout
    files[3].unlink()
    assert "gone" in run("ckd_dist.lineage", adopted, status=1).stdout


def test_an_online_student_of_an_adopted_run_needs_its_normalisation(files, fashion, tmp_path):
    adopted = tmp_path / "adopted"
    adopt_here(*words(files.values(), fashion, adopted, "--mean", "[0.5,0.5,0.5]", "--std", "[0.25,0.25,0.25]"))
    metadata = checkpoint.load(checkpoint.checkpoint_path(adopted, 3), "")["metadata"]
    assert (metadata["mean"], metadata["std"]) == ([0.5, 0.5, 0.5], [0.25, 0.25, 0.25])
    student = ["--data.train", fashion["holdout"], "--model.name", "resnet8", "--data.batch_size", 100]
    with pytest.raises(UserError, match=r"trained with mean \[0\.5, 0\.5, 0\.5\].*: cache its logits instead"):
        run_here("distill", *student, "--teacher.run", adopted, "--run_dir", tmp_path / "online")


# ------------------------------------------------------------------------------------------- classes


def test_a_network_of_more_classes_is_measured_on_images_of_some(fashion, teacher, tmp_path, capsys):
    """Its classes are named in a file; the images' labels are mapped by name."""
    model, metadata = load_model(checkpoint.checkpoint_path(teacher, 3), "")
    names = ["sofa", *reversed(metadata["classes"]), "tram"]
    wider = model.state_dict()
    for name in ("fc.weight", "fc.bias"):
        rows = wider[name].flip(0)
        low = torch.full_like(rows[:1], -100 if name == "fc.bias" else 0)
        wider[name] = torch.cat([low, rows, low])
    torch.save(wider, tmp_path / "wide.pt")
    (tmp_path / "classes.txt").write_text("\n".join(names) + "\n")
    more = ["--epochs", "[3]", "--classes", tmp_path / "classes.txt", "--amp", "off"]
    options = words([tmp_path / "wide.pt"], fashion, tmp_path / "run", *more)
    assert "has 10 classes" in refusal(*options) and not (tmp_path / "run").exists()
    adopt_here(*options, "--data.map_classes", "by_name")
    assert "2 of its 12 classes have no images" in capsys.readouterr().out
    found = checkpoint.load(checkpoint.checkpoint_path(tmp_path / "run", 3), "")["metadata"]
    assert found["classes"] == names and found["num_classes"] == 12
    assert summary(tmp_path / "run")["top1"] == pytest.approx(metadata["evaluation"]["top1"], abs=1)
    (tmp_path / "classes.txt").write_text("\n".join([*names[1:], "sofa"]))
    assert "holds a run with classes" in refusal(*options, "--data.map_classes", "by_name")


# ------------------------------------------------------------------------------------------- refusals


def test_a_checkpoint_below_the_least_accuracy_is_refused_and_nothing_is_written(files, fashion, tmp_path):
    torch.save({"epoch": 4, **load_model_of(files[3], seed=1)}, tmp_path / "untrained.pth")
    paths = [files[3], tmp_path / "untrained.pth"]
    found = refusal(*words(paths, fashion, tmp_path / "run", "--min_top1", 40))
    assert f"min_top1: {tmp_path}/untrained.pth reaches " in found and "less than 40.0 %: look whether --mean" in found
    assert not (tmp_path / "run").exists()


def load_model_of(path: Path, seed: int) -> dict:
    """Weights of the names and shapes of a file's, all drawn anew."""
    state = torch.load(path, weights_only=False)["model"]
    rng = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(each.shape, generator=rng) if each.is_floating_point() else each
        for name, each in state.items()
    }


def test_epochs_are_told_by_the_files_or_by_the_options(files, fashion, tmp_path):
    silent = tmp_path / "silent.pt"
    torch.save(torch.load(files[1], weights_only=False)["model"], silent)
    assert f"files: {silent} does not tell its epoch: give" in refusal(*words([silent], fashion, tmp_path / "run"))
    twice = refusal(*words([files[1], files[1]], fashion, tmp_path / "run"))
    assert f"files: {files[1]} is of epoch 1, as another one: tell them apart with --epochs" in twice
    assert "epochs has 1 values for 2 files" in refusal(*words(files.values(), fashion, "x", "--epochs", "[1]"))
    adopt_here(*words([files[3], silent], fashion, tmp_path / "run", "--epochs", "[40,20]"))
    assert list(checkpoint.trajectory(tmp_path / "run", "")) == [20, 40]
    last = load_model(checkpoint.checkpoint_path(tmp_path / "run", 40), "")[0].state_dict()
    assert torch.equal(last["fc.bias"], torch.load(files[3], weights_only=False)["model"]["module.fc.bias"])


def test_another_file_in_the_place_of_one_is_refused_and_a_moved_one_is_not(files, fashion, tmp_path, capsys):
    options = words(files.values(), fashion, tmp_path / "run")
    adopt_here(*options)
    before = contents(tmp_path / "run")
    (tmp_path / "moved").mkdir()
    moved = [Path(shutil.copy(path, tmp_path / "moved")) for path in files.values()]
    adopt_here(*words(moved, fashion, tmp_path / "run"))
    assert "complete already" in capsys.readouterr().out
    state = torch.load(files[3], weights_only=False)
    state["model"]["module.fc.bias"] += 1
    torch.save(state, files[3])
    assert f"made of another files 3, {files[3]} has changed since (sha256 was " in refusal(*options)
    assert "holds a run with checkpoints [1, 3], not [1]" in refusal(*words([files[1]], fashion, tmp_path / "run"))
    assert contents(tmp_path / "run") == before


def test_a_run_that_was_trained_is_not_adopted_over(files, fashion, teacher, tmp_path):
    trained = Path(shutil.copytree(teacher, tmp_path / "run"))
    before = contents(trained)
    assert "choose another run_dir" in refusal(*words(files.values(), fashion, trained))
    assert contents(trained) == before


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_sharded_checkpoint_is_adopted_when_it_is_trusted(files, fashion, tmp_path):
    dcp.save(torch.load(files[3], weights_only=False), checkpoint_id=tmp_path / "step", no_dist=True)
    options = words([tmp_path / "step"], fashion, tmp_path / "run")
    assert "give --trust" in refusal(*options)
    adopt_here(*options, "--trust")
    adopt_here(*options, "--trust", "true")
    next((tmp_path / "step").glob("*.distcp")).touch()
    assert list(checkpoint.trajectory(tmp_path / "run", "")) == [3]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (
            ["--model.name", "resnet20"],
            "model_1.pth at model does not fit resnet20: features.4.conv1.weight is (32, 16, 3, 3) in",
        ),
        (["--model.name", "resnet9"], "model.name: no model resnet9"),
        (["--model.weights", "x.pt"], "model.weights: the weights are those of --files"),
        (["--key", "model_ema"], "has no weights at model_ema; there are: model"),
        (["--files", "[]"], "files is empty"),
        (["--mean", "[0.5]"], "mean is [0.5]: give three numbers"),
        (["--classes", "nowhere.txt"], "classes: no such file: nowhere.txt"),
    ],
    ids=range(7),
)
def test_bad_options_are_refused_in_one_line(more, expected, files, fashion, tmp_path):
    assert expected in refusal(*words(files.values(), fashion, tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


def test_a_list_of_classes_is_a_line_each(files, fashion, tmp_path):
    path = tmp_path / "classes.txt"
    for content, expected in (
        (b"", "is no list of names"),
        (b"\xff", "is no list of names"),
        (b"a\nb\na", "names a tw"),
    ):
        path.write_bytes(content)
        assert expected in refusal(*words(files.values(), fashion, tmp_path / "run", "--classes", path))


def test_images_without_labels_measure_nothing(files, photographs, tmp_path):
    pictures = tmp_path / "pictures.beton"
    root = photographs.with_name("others")
    assert (
        write("--dataset", "images", "--root", root, "--split", "train", "--holdout", 0, "--out", pictures).status == 0
    )
    found = refusal(*words(files.values(), {"holdout": pictures}, tmp_path / "run"))
    assert "data.val: the images of" in found and "have no labels" in found and not (tmp_path / "run").exists()


def test_the_least_accuracy_may_be_reached(files, fashion, tmp_path):
    adopt_here(*words(files.values(), fashion, tmp_path / "run", "--min_top1", 5))
    assert np.isfinite(summary(tmp_path / "run")["loss"])


# ------------------------------------------------------------------------------------------- other networks


def test_a_network_of_timm_is_shown_what_its_library_says(photographs, tmp_path, capsys):
    """On photographs; those of small images have the size that they have."""
    import timm
    from timm.data import resolve_data_config

    torch.manual_seed(0)
    model = timm.create_model("test_resnet.r160_in1k", num_classes=3)
    torch.save({"state_dict": model.state_dict(), "epoch": 5}, tmp_path / "last.pth.tar")
    options = words([tmp_path / "last.pth.tar"], {"holdout": photographs}, tmp_path / "run")
    adopt_here(*options, "--model.name", "timm/test_resnet.r160_in1k", "--amp", "off")
    told = resolve_data_config({}, model=model)
    path = checkpoint.checkpoint_path(tmp_path / "run", 5)
    metadata = checkpoint.load(path, "", checkpoint.KeptState)["metadata"]
    assert (metadata["image_size"], metadata["crop_share"]) == (told["input_size"][-1], told["crop_pct"])
    assert (metadata["mean"], metadata["std"]) == (list(told["mean"]), list(told["std"]))
    assert f"at {told['input_size'][-1]} px, the central {told['crop_pct']:.3g} of it, norm" in capsys.readouterr().out
    run_here("evaluate", "--data.val", photographs, "--checkpoint", path, "--amp", "off")
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (again["top1"], again["loss"]) == (summary(tmp_path / "run")["top1"], summary(tmp_path / "run")["loss"])


def test_a_network_of_the_users_own_code_is_adopted_with_it(fashion, tmp_path, capsys):
    source = tmp_path / "small_net.py"
    source.write_text(
        "from torch import nn\n\n\ndef small(num_classes, width=4):\n"
        "    return nn.Sequential(nn.Conv2d(3, width, 3, 2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(num_classes))\n"
    )
    weights = {"0.weight": (6, 3, 3, 3), "0.bias": (6,), "3.weight": (10, 6 * 13 * 13), "3.bias": (10,)}
    saved = {f"module.{name}": torch.randn(shape) for name, shape in weights.items()}
    torch.save(saved, tmp_path / "x.pt")
    options = words([tmp_path / "x.pt"], fashion, tmp_path / "run", "--epochs", "[9]", "--model.options.width", 6)
    name = f"{source}:small"
    adopt_here(*options, "--model.name", name)
    model, metadata = load_model(checkpoint.checkpoint_path(tmp_path / "run", 9), "", name)
    assert metadata["options"] == {"width": 6} and torch.equal(model.get_parameter("3.bias"), saved["module.3.bias"])
    assert "sha256" in run("ckd_dist.lineage", tmp_path / "run").stdout
    source.write_text(source.read_text() + "# changed\n")
    assert "made of another model.source" in refusal(*options, "--model.name", name)
