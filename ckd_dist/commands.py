"""The commands whose options can be given by a file: a module's name -> its options."""

from __future__ import annotations

from ckd_dist.search.options import SearchConfig
from ckd_dist.selection.options import SelectConfig
from ckd_dist.store.options import CacheConfig
from ckd_dist.train.options import AdoptConfig, DistillConfig, EvaluateConfig, ExportConfig, TrainTeacherConfig

COMMANDS: dict[str, type] = {
    "ckd_dist.train_teacher": TrainTeacherConfig,
    "ckd_dist.adopt": AdoptConfig,
    "ckd_dist.cache_logits": CacheConfig,
    "ckd_dist.select_teacher": SelectConfig,
    "ckd_dist.distill": DistillConfig,
    "ckd_dist.search": SearchConfig,
    "ckd_dist.evaluate": EvaluateConfig,
    "ckd_dist.export": ExportConfig,
}
"""Module of a command -> its options."""
