"""The one class of error of this room, and the extra packages that it needs."""

import importlib
from typing import Any


class ModelError(ValueError):
    """A file of a model is not what it must be, or asks for what is not supported. The text is one sentence."""


def need(module: str) -> Any:
    """A module of the extra `models`, imported when it is first needed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ModelError(f'{package} must be installed: pip install "ringjax[models]". Got: {error}.') from error
