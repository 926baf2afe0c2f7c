"""Precision fits the machine without an option: native bfloat16, else float16 on GPUs, else float32; and stays."""

from __future__ import annotations

import os

import pytest
import torch

from ckd_dist import cache_logits, train_teacher
from ckd_dist.core import precision
from ckd_dist.core.identity import saved_options
from ckd_dist.core.options import load_config
from ckd_dist.store.manifest import Manifest
from ckd_dist.store.options import CacheConfig
from ckd_dist.train.options import TrainTeacherConfig
from tests.helpers.commands import ENVIRONMENT, run
from tests.helpers.stores import cache_options

WITHOUT_AVX512 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


@pytest.fixture
def machine(monkeypatch):
    """Makes this process believe in another machine."""

    def pretend(capability, features=(), gpu_has_bfloat16=None):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(features, True), raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu_has_bfloat16 is not None)
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or gpu_has_bfloat16
        )

    return pretend


@pytest.mark.parametrize(
    ("expected", "described"),
    [
        ("off", ("AVX2", ["avx2"])),
        ("off", ("AVX2", ["avx2", "avx512_bf16"])),  # a processor that can, a torch that is told not to
        ("off", ("AVX512", ["avx2", "avx512_f"])),  # Skylake
        ("bfloat16", ("AVX512", ["avx512_f", "avx512_bf16"])),
        ("bfloat16", ("AVX512", ["avx512_f", "amx_bf16"])),
        ("bfloat16", ("SVE256", ["sve_bf16"])),
        ("float16", ("AVX512", ["avx512_bf16"], False)),  # V100, T4, TITAN Xp
        ("bfloat16", ("AVX2", [], True)),
    ],
)
def test_auto_is_what_the_device_computes_in_itself(machine, expected, described):
    machine(*described)
    assert precision.automatic() == expected


def small(fashion, run_dir, *more):
    words = ["--data.train", fashion["holdout"], "--data.batch_size", 100, "--model.name", "resnet8", "--epochs", 1]
    return load_config(TrainTeacherConfig, [str(word) for word in [*words, "--run_dir", run_dir, *more]])


def amp_of(run_dir):
    return saved_options(run_dir)["amp"]


def test_a_run_goes_on_in_the_precision_that_it_began_in(fashion, tmp_path, machine, capsys):
    machine("AVX2")
    train_teacher.main(small(fashion, tmp_path / "run"))
    assert amp_of(tmp_path / "run") == "off" and "in float32" in capsys.readouterr().out
    machine("AVX512", ["avx512_bf16"])
    (tmp_path / "run" / "summary.json").unlink()  # so that it goes on
    train_teacher.main(small(fashion, tmp_path / "run"))
    assert amp_of(tmp_path / "run") == "off" and "in float32" in capsys.readouterr().out


def test_a_type_that_is_emulated_is_done_as_asked_and_warned_of(fashion, tmp_path, machine, capsys):
    machine("AVX2")
    train_teacher.main(small(fashion, tmp_path / "run", "--amp", "bfloat16"))
    assert amp_of(tmp_path / "run") == "bfloat16"
    assert "warning: this device has no bfloat16 of its own" in capsys.readouterr().out


def test_a_store_grows_in_the_precision_that_it_began_in(fashion, teacher, tmp_path, machine):
    def cache(*checkpoints):
        words = cache_options(fashion, teacher, tmp_path / "store", "--views", 1, "--teacher.checkpoints", *checkpoints)
        cache_logits.main(load_config(CacheConfig, words))
        return Manifest.load(tmp_path / "store", "").forward["amp"]

    machine("AVX2")
    assert cache("[1]") == "off"
    machine("AVX512", ["avx512_bf16"])
    assert cache("[1,2]") == "off"


@pytest.mark.skipif(torch.cuda.is_available(), reason="its GPU decides")
def test_a_real_machine_without_fast_bfloat16_is_known(teacher, fashion):
    last = teacher / "checkpoints" / "epoch_0003.pt"
    environment = {**ENVIRONMENT, **os.environ, **WITHOUT_AVX512}
    done = run("ckd_dist.evaluate", "--data.val", fashion["holdout"], "--checkpoint", last, env=environment)
    assert '"amp": "off"' in done.stdout
