"""What goes wrong, as users see it."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input: shown to the user as one line that names the option or file and the mend."""


class TrainingError(RuntimeError):
    """Training cannot go on (a loss that is not finite): one line, exit status 1."""


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)
