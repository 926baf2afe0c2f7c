"""Commands in the process of the test."""

from __future__ import annotations

from ckd_dist import adopt, cache_logits, distill, evaluate, select_teacher, train_teacher
from ckd_dist.commands import COMMANDS
from ckd_dist.core.options import load_config
from ckd_dist.search import __main__ as search
from ckd_dist.store.__main__ import main as store_command
from ckd_dist.store.options import CacheConfig

MAIN = {
    "train_teacher": train_teacher,
    "adopt": adopt,
    "distill": distill,
    "cache_logits": cache_logits,
    "select_teacher": select_teacher,
    "search": search,
    "evaluate": evaluate,
}


def here(command, cls, *words: object) -> None:
    """Run a command's module in this process, with options of the class `cls`."""
    command.main(load_config(cls, [str(word) for word in words]))


def run_here(name: str, *words: object) -> None:
    """Run a command in this process, by its name."""
    arguments = [str(word) for word in words]
    if name == "convert":
        store_command(["convert", *arguments])
        return
    MAIN[name].main(load_config(COMMANDS[f"ckd_dist.{name}"], arguments))


def cache_here(*words):
    """`python -m ckd_dist.cache_logits` in this process."""
    cache_logits.main(load_config(CacheConfig, [str(word) for word in words]))


def store_here(*words):
    """`python -m ckd_dist.store` in this process; its exit status."""
    return store_command([str(word) for word in words])
