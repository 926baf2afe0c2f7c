"""What goes wrong, as users see it."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input: shown to the user as one line that names the option or file and the mend."""


class TrainingError(RuntimeError):
    """Training cannot go on (a loss that is not finite): one line, exit status 1."""


def first_line(error: BaseException) -> str:
    """Of what another's code says of an error, up to 200 characters; the kind of error where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)
