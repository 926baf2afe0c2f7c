"""A function of the user's that gets every line of a training's record: for Weights & Biases, MLflow, Trackio."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from ckd_dist.core.errors import UserError, require


class LogHook:
    """The function that the option `--log_to module:function` names."""

    def __init__(self, name: str):
        """Import it, from installed packages or the folder that the command is started in; raises `UserError` where
        there is none."""
        module, _, function = name.partition(":")
        require(bool(module and function), f"log_to: {name} is no module:function, as my_logging:log")
        try:
            found: Any = getattr(importlib.import_module(module), function, None)
        except Exception as error:  # whatever the user's module raises
            raise UserError(f"log_to: {name} cannot be imported ({_words(error)})") from error
        require(callable(found), f"log_to: the module {module} has no function {function}")
        self._name = name
        self._function: Callable[[dict[str, Any]], object] = found

    def __call__(self, values: dict[str, Any]) -> None:
        """Call it with a line; raises `UserError` where it fails."""
        try:
            self._function(values)
        except Exception as error:
            raise UserError(
                f"log_to: {self._name} failed at step {values['step']} ({_words(error)}): mend it, or leave it out: "
                "the same command goes on"
            ) from error


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
