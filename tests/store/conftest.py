"""The shared store in other codecs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.commands import run
from tests.helpers.here import store_here
from tests.helpers.shared import make_once
from tests.helpers.stores import cache_options


@pytest.fixture(scope="session")
def topk(tmp_path_factory: pytest.TempPathFactory, fashion: dict[str, Path], teacher: Path) -> Path:
    """The shared store once more, with four logits a record, one teacher in memory at a time."""

    def make(folder: Path) -> None:
        codec = ("--codec", "topk", "--k", 4, "--teachers-at-once", 1)
        run("ckd_dist.cache_logits", *cache_options(fashion, teacher, folder / "store", *codec))

    return make_once(tmp_path_factory, "topk", make) / "store"


@pytest.fixture
def from_dense(store: Path, fashion: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """Converts the shared store, to the codec of the options that it is given."""

    def convert(*codec: object) -> Path:
        path = tmp_path / "converted"
        assert store_here("convert", store, path, "--data.train", fashion["train"], *codec) == 0
        return path

    return convert
