"""What goes wrong, as users see it."""


class InputError(ValueError):
    """Something the user can mend. The message is the one line to show: it names the option or file."""
