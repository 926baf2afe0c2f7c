"""Distributed knowledge distillation from a teacher's checkpoints.

What a training loop of your own takes of it, docs/loops.md: names that are imported when they are first used, so that
`import ckd_dist` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckd_dist.api.caching import cache
    from ckd_dist.api.loader import Loader
    from ckd_dist.api.store import Store, open_store
    from ckd_dist.api.views import Views, ViewSampler
    from ckd_dist.data.beton_images import BetonImages
    from ckd_dist.data.recipe import ViewRecipe
    from ckd_dist.store.options import CodecConfig

__all__ = [
    "BetonImages",
    "CodecConfig",
    "Loader",
    "Store",
    "ViewRecipe",
    "ViewSampler",
    "Views",
    "cache",
    "open_store",
]

_MODULES = {
    "BetonImages": "data.beton_images",
    "CodecConfig": "store.options",
    "Loader": "api.loader",
    "Store": "api.store",
    "ViewRecipe": "data.recipe",
    "ViewSampler": "api.views",
    "Views": "api.views",
    "cache": "api.caching",
    "open_store": "api.store",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"ckd_dist.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
