"""How a command refuses what it was given. Imports nothing from ringjax."""


class UsageError(ValueError):
    """Flags of a command that do not fit: one line that names the flag, what is required and what was given."""


def check_at_least_one(**values: int | None) -> None:
    """Raises UsageError for the first flag, here by its name in Python, whose number is below 1; None is not given."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1. Got {value}.")
